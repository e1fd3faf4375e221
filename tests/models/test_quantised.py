"""A model whose weights are quantised while they are loaded is transformers' with weights rounded to the same codes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specserve.config import EngineConfig
from specserve.core.errors import InvalidRequestError
from specserve.layers import storage
from specserve.layers.embedding import VocabMatrix
from specserve.layers.quantised import QuantisedHead, QuantisedStorage
from specserve.layers.storage import Parameter
from specserve.loading import load_model, quantization
from specserve.loading.quantization import check_quantization, int8_share, resolve_quantization
from specserve.loading.transfer import PIECE_BYTES
from specserve_kernels.skinny.codes import Coded
from specserve_kernels.tolerances import MODEL

TEXT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]


def rounded(weight: Tensor, kind: str) -> Tensor:
    """Each row to the nearest multiples of its scale, or to the nearest e4m3 floats times it."""
    most = {"int8": 127, "fp8": 448}[kind]
    scale = (weight.float().abs().max(dim=1, keepdim=True).values / most).bfloat16().float()
    codes = weight.float() / scale
    codes = codes.round() if kind == "int8" else codes.to(torch.float8_e4m3fn).float()
    return (codes.clamp(-most, most) * scale).to(weight.dtype)


def round_linears(oracle: Any, kind: str) -> None:
    for module in oracle.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(rounded(module.weight.detach(), kind))  # its own, where it was shared


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("family", "tied"), [("Llama", False), ("Llama", True), ("Qwen2", False), ("Qwen3", True)])
def test_logits_are_those_of_the_rounded_weights(kind: str, family: str, tied: bool, save: Any, paged: Any) -> None:
    saved = save(family, tie_word_embeddings=tied)
    plain = saved.oracle(torch.tensor([TEXT])).logits[0]
    round_linears(saved.oracle, kind)
    with torch.no_grad():
        expected = saved.oracle.double()(torch.tensor([TEXT])).logits[0]
    model = load_model(str(saved.path), dtype="float64", quantization=kind)
    assert isinstance(model.head, QuantisedHead)
    assert all(isinstance(linear.storage, QuantisedStorage) for linear in model.linears)
    assert model.spec.quantization == kind
    logits = paged(model, [TEXT]).step({0: len(TEXT)})[0]
    rtol, atol = MODEL[torch.float32]  # the oracle's norms are in float32
    torch.testing.assert_close(logits, expected, rtol=rtol, atol=atol)
    assert (logits - plain).abs().max() > 100 * atol  # not held by leaving weights as they are


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_pieces_quantise_as_the_whole_and_none_is_larger(kind: str, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that beside the quantised model, loading holds a few pieces, never a model, nor a matrix, that is not."""
    path = str(save(tie_word_embeddings=True).path)
    whole = load_model(path, quantization=kind)
    sizes: list[int] = []
    encode = storage.encode

    def noted(tensor: Tensor, into: Coded) -> None:
        sizes.append(into.codes.nbytes)
        encode(tensor, into)

    monkeypatch.setattr(storage, "encode", noted)
    monkeypatch.setitem(PIECE_BYTES, "cpu", 256)
    pieces = load_model(path, quantization=kind)
    assert max(sizes) <= 256 < max(linear.spec.in_features * 16 for linear in whole.linears)
    for name, parameter in whole.parameters.items():
        _assert_same(parameter, pieces.parameters[name])


def _assert_same(one: Parameter, other: Parameter) -> None:
    assert torch.equal(one.destination.float(), other.destination.float())
    if one.scales is not None:
        assert other.scales is not None
        assert torch.equal(one.scales, other.scales)
    if one.twin is not None:
        assert other.twin is not None
        _assert_same(one.twin, other.twin)


def test_without_quantisation_a_tied_head_stays_the_embedding(save: Any) -> None:
    model = load_model(str(save(tie_word_embeddings=True).path), quantization="none")
    assert model.head is model.embedding
    assert isinstance(model.head, VocabMatrix)


def test_auto_takes_int8_on_a_cpu_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    large = SimpleNamespace(hidden_size=2048, intermediate_size=8192)
    small = SimpleNamespace(hidden_size=128, intermediate_size=448)
    asked: list[tuple[int, int]] = []
    for share, expected in ((0.5, "int8"), (0.95, "none")):
        monkeypatch.setattr(quantization, "int8_share", lambda *shape, share=share: asked.append(shape) or share)
        assert resolve_quantization("auto", large, torch.float32, cpu) == expected
    assert asked == [(2048, quantization.MOST_OUTPUTS)] * 2
    assert resolve_quantization("auto", small, torch.float32, cpu) == "none"
    for dtype in (torch.float64, torch.bfloat16):
        assert resolve_quantization("auto", large, dtype, cpu) == "none"
    assert len(asked) == 2
    assert resolve_quantization("int8", small, torch.float64, cpu) == "int8"


def test_the_measurement_compares_both() -> None:
    """A clock that runs twice as fast while int8 is measured."""
    calls = 0
    half = 2 * quantization.RUNS * len(quantization.ROWS)

    def clock() -> float:
        nonlocal calls
        calls += 1
        return calls * (1.0 if calls <= half else 2.0)

    share = int8_share(64, 32, clock)
    assert calls == 2 * half
    assert 1.5 < share < 3.0


def test_auto_keeps_weights_as_they_are_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "has_fp8", lambda device: True)
    monkeypatch.setattr(quantization, "int8_share", lambda *shape: 0.1)
    large = SimpleNamespace(hidden_size=2048, intermediate_size=8192)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert resolve_quantization("auto", large, dtype, torch.device("cuda")) == "none"
        assert resolve_quantization("fp8", large, dtype, torch.device("cuda")) == "fp8"


def test_what_is_impossible_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="--draft-quantization int8 needs --draft-model") as refused:
        check_quantization(EngineConfig(draft_quantization="int8"), torch.device("cpu"))
    assert refused.value.param == "draft_quantization"
    monkeypatch.setattr(quantization, "has_fp8", lambda device: False)
    for settings in ({"quantization": "fp8"}, {"draft_quantization": "fp8", "draft_model": "x"}):
        config = EngineConfig(**settings)
        with pytest.raises(InvalidRequestError, match=r"fp8 needs a GPU of compute capability 8\.9") as refused:
            check_quantization(config, torch.device("cuda"))
        assert refused.value.param == next(iter(settings))
        check_quantization(config, torch.device("cpu"))
    with pytest.raises(InvalidRequestError, match="--quantization is 'int4'"):
        EngineConfig(quantization="int4").validate()
