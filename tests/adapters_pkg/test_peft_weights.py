"""Values from the file to the blob: as they lie or converted, α / r folded in, nothing that is not finite."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specserve.core.errors import AdapterError
from specserve_adapters import adapter_files
from specserve_adapters.adapter_files import hash_adapter, version_of
from specserve_adapters.helpers import in_parallel, make_helpers
from specserve_adapters.host_adapter import num_modules, unpack
from specserve_adapters.host_memory import HostMemory
from specserve_adapters.peft_reader import read_adapter
from specserve_adapters.safetensors_file import parse_header
from specserve_adapters.spec import LinearSpec

SPECS = [LinearSpec(0, 24, (("self_attn.q_proj", 16), ("self_attn.k_proj", 8))), LinearSpec(1, 40, (("mlp.up", 24),))]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, dtypes: list[torch.dtype], rank: int = 3, alpha: float = 3.0) -> dict[str, torch.Tensor]:
    """A LoRA on every module; the dtypes in turn."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for index, (spec, part, width) in enumerate((s, p, w) for s in SPECS for p, w in s.parts):
        for side, shape in (("A", (rank, spec.in_features)), ("B", (width, rank))):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            name = f"base_model.model.model.layers.{spec.layer}.{part}.lora_{side}.weight"
            tensors[name] = values.to(dtypes[index % len(dtypes)])
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("alpha", [3.0, 6.0, 0.75, 7.0, -3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file_dtypes", [[dtype] for dtype in DTYPES] + [[torch.float16, torch.float64]], ids=str)
def test_scaling_is_folded_as_in_float64(
    file_dtypes: list[torch.dtype], dtype: torch.dtype, alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "PIECE_BYTES", 512)
    tensors = write(tmp_path, file_dtypes, alpha=alpha)
    adapter = read_adapter(tmp_path, SPECS, max_rank=8, dtype=dtype).adapter
    for (layer, part, _), (a, b) in adapter.factors.items():
        name = f"base_model.model.model.layers.{layer}.{part}.lora_"
        assert torch.equal(a, tensors[f"{name}A.weight"].to(dtype))
        assert torch.equal(b, (tensors[f"{name}B.weight"].double() * (alpha / 3)).to(dtype))
    places, blob = unpack(adapter.payload, num_modules(SPECS), dtype)
    assert torch.equal(blob, adapter.blob)
    for (from_a, from_b, rank), (a, b) in zip(places.tolist(), adapter.factors.values(), strict=True):
        assert rank == 3
        assert torch.equal(blob[from_a : from_a + a.numel()], a.flatten())
        assert torch.equal(blob[from_b : from_b + b.numel()], b.flatten())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e30, -2e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_value_is_looked_at(
    dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "PIECE_BYTES", 512)
    tensors = write(tmp_path, [dtype])
    for name, tensor in tensors.items():
        for place in (0, tensor.numel() - 1):
            bad = tensor.clone()
            bad.view(-1)[place] = value
            save_file({**tensors, name: bad}, tmp_path / WEIGHTS)
            with pytest.raises(AdapterError, match=name):
                read_adapter(tmp_path, SPECS, max_rank=8, dtype=dtype)
    largest = min(1e30, torch.finfo(dtype).max) * 0.99
    save_file({name: torch.full_like(t, -largest) for name, t in tensors.items()}, tmp_path / WEIGHTS)
    read_adapter(tmp_path, SPECS, max_rank=8, dtype=dtype)


def test_helpers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_files, "PIECE_BYTES", 512)
    threads = torch.get_num_threads()
    helpers = make_helpers(3)
    assert torch.get_num_threads() == threads
    for dtypes in ([torch.bfloat16], [torch.float32]):
        write(tmp_path, dtypes, alpha=7.0)
        alone = read_adapter(tmp_path, SPECS, max_rank=8, dtype=torch.bfloat16)
        helped = read_adapter(tmp_path, SPECS, max_rank=8, dtype=torch.bfloat16, helpers=helpers)
        for one, other in zip(*(unpack(r.adapter.payload, 3, torch.bfloat16) for r in (alone, helped)), strict=True):
            assert torch.equal(one, other)
        assert alone.contents == helped.contents
        assert version_of(alone.contents, None) == hash_adapter(tmp_path, None)
    helpers.shutdown()


def test_a_failure_is_told_when_all_helpers_have_ended() -> None:
    ended: list[int] = []

    def work(item: int) -> None:
        if item == 0:
            raise AdapterError("first")
        time.sleep(0.02)
        ended.append(item)

    helpers = make_helpers(2)
    with pytest.raises(AdapterError, match="first"):
        in_parallel(helpers, work, range(6))
    assert sorted(ended) == [1, 2, 3, 4, 5]
    helpers.shutdown()


def test_memory_comes_back(tmp_path: Path) -> None:
    """From adapters that die and from reads that fail."""
    memory = HostMemory(
        3 << 14, pin=True, piece_bytes=1 << 14, allocate=lambda size: torch.zeros(size, dtype=torch.uint8)
    )
    free = memory.free_bytes()
    assert free == 1 << 16
    tensors = write(tmp_path, [torch.bfloat16])
    adapters = [
        read_adapter(tmp_path, SPECS, max_rank=8, dtype=torch.bfloat16, memory=memory).adapter for _ in range(3)
    ]
    assert len({adapter.payload.data_ptr() for adapter in adapters}) == 3
    assert memory.free_bytes() < free
    del adapters
    assert memory.free_bytes() == free
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="NaN"):
        read_adapter(tmp_path, SPECS, max_rank=8, dtype=torch.bfloat16, memory=memory)
    assert memory.free_bytes() == free


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": ENTRY}, 23, "should hold 24 bytes"),
        ({"a": ENTRY}, 25, "should hold 24 bytes"),
        ({"a": {**ENTRY, "shape": [2, 4]}}, 24, "do not fit its shape"),
        ({"a": {**ENTRY, "shape": [-2, -3]}}, 24, "impossible shape"),
        ({"a": {**ENTRY, "data_offsets": [24, 0]}}, 24, "impossible shape or place"),
        ({"a": {**ENTRY, "data_offsets": [8, 32]}}, 32, "holes"),
        ({"a": ENTRY, "b": ENTRY}, 48, "overlap"),
        ({"a": {**ENTRY, "data_offsets": "x"}}, 24, "data_offsets"),
        ({"a": 3}, 24, "header"),
        ([ENTRY], 24, "header"),
    ],
)
def test_headers_that_lie(header: object, data: int, said: str) -> None:
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text
    with pytest.raises(AdapterError, match=said):
        parse_header(raw, len(raw) + data)
    with pytest.raises(AdapterError, match="cut off"):
        parse_header(raw[:-1], len(raw) + data)


def test_unknown_dtypes_are_named() -> None:
    other = {"dtype": "F32", "shape": [6], "data_offsets": [24, 48]}
    header = {"__metadata__": {"format": "pt"}, "a": {**ENTRY, "dtype": "F4"}, "c": other}
    text = json.dumps(header).encode()
    tensors = parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text) + 48)
    assert (tensors["a"].dtype, tensors["a"].dtype_name) == (None, "F4")
    assert tensors["c"].shape == (6,)
