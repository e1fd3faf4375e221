"""Products of few rows with codes of one byte against the decoded matrix in float64: odd shapes, every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specserve.layers.quantised import QuantisedStorage
from specserve.layers.storage import DenseStorage
from specserve_kernels import dispatch
from specserve_kernels.language import tl, triton
from specserve_kernels.skinny.codes import Coded, Kind, decode_ref, decode_triton, empty_coded, encode
from specserve_kernels.skinny.linear import skinny_linear_ref
from specserve_kernels.skinny.quantised import quantised_one_row_triton
from specserve_kernels.skinny.quantised_rows import choose_cut, quantised_rows_triton
from specserve_kernels.skinny.quantised_words import choose_splits, quantised_words_triton, takes_words, widen
from specserve_kernels.tolerances import MODEL, OP

VARIANTS = [(False, False, False), (True, False, False), (False, True, False), (False, True, True), (True, True, False)]
KINDS: tuple[Kind, ...] = ("fp8", "int8")


def made(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.25).to(device, dtype)


def coded(kind: Kind, out_dim: int, in_dim: int, device: torch.device) -> Coded:
    into = empty_coded(kind, out_dim, in_dim, device)
    encode(made(out_dim, in_dim, dtype=torch.float32, device=device), into)
    return into


@pytest.mark.parametrize("kind", KINDS)
def test_decoding(kind: Kind, device: torch.device) -> None:
    weight = coded(kind, 37, 130, device)
    assert torch.equal(decode_triton(weight, torch.float32), decode_ref(weight, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        rtol, atol = OP[dtype]
        torch.testing.assert_close(decode_triton(weight, dtype), decode_ref(weight, dtype), rtol=rtol, atol=atol)


@triton.jit
def _widen_kernel(words, out, SIZE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + tl.arange(0, 4 * SIZE), tl.reshape(widen(tl.load(words + at), FP8, NATIVE), (4 * SIZE,)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_widened_exactly(kind: Kind, device: torch.device) -> None:
    codes = torch.arange(256, device=device).to(torch.uint8)
    out = torch.empty(256, dtype=torch.bfloat16, device=device)
    is_fp8 = kind == "fp8"
    _widen_kernel[(1,)](codes.view(torch.int32), out, SIZE=64, FP8=is_fp8, NATIVE=device.type == "cuda")
    expected = codes.view(torch.float8_e4m3fn if is_fp8 else torch.int8).double()
    finite = ~expected.isnan()  # two codes that no weight has
    assert torch.equal(out.double()[finite] * (2.0**120 if is_fp8 else 1), expected[finite])
    assert out.isfinite().all()  # what is read beyond a row's end is multiplied by zero


# rows, adds, gated; out, in; parts along `in` (None: as chosen)
THROUGH_REGISTERS = [
    (2, 0, 0, 76, 300, 1), (3, 0, 1, 40, 2088, None), (8, 0, 0, 32, 4096, None), (8, 1, 0, 40, 1024, 1),
    (5, 0, 1, 80, 2048, 2), (7, 1, 0, 76, 584, 4), (8, 0, 1, 40, 1160, 3), (6, 1, 0, 33, 520, 8),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", THROUGH_REGISTERS)
def test_codes_through_registers(kind: Kind, case: tuple[int, ...], device: torch.device) -> None:
    """Rows and columns that fill no tile, parts that get nothing, parts of full tiles, x and the residual as views."""
    torch.manual_seed(3)
    rows, adds, gated, out_dim, in_dim, splits = case
    x = made(rows + 2, in_dim + 8, dtype=torch.bfloat16, device=device)[1 : rows + 1, :in_dim]
    weight = coded(kind, out_dim, in_dim, device)
    residual = made(rows, out_dim + 8, dtype=x.dtype, device=device)[:, :-8] if adds else None
    more = None if residual is None else residual.double()
    expected = skinny_linear_ref(x.double(), decode_ref(weight, torch.float64), more, None, bool(gated))
    arrivals = torch.zeros(64, dtype=torch.int32, device=device)

    def run(first: int) -> torch.Tensor:
        mine = None if residual is None else residual[first:].clone()
        return quantised_words_triton(x[first:], weight, mine, bool(gated), arrivals, splits)

    got = run(0)
    rtol, atol = OP[x.dtype]
    torch.testing.assert_close(got, expected.to(x.dtype), rtol=rtol, atol=atol)
    assert not arrivals.any()
    assert torch.equal(run(0), got)
    assert torch.equal(run(1), got[1:])  # a row does not depend on the others


@pytest.mark.usefixtures("device")
def test_what_goes_through_registers() -> None:
    """Few rows of bfloat16; parts of 1024 columns or more, and no more of them than keep a GPU busy."""
    assert takes_words(torch.empty(8, 64, dtype=torch.bfloat16))
    for rows, in_dim, dtype in ((9, 64, torch.bfloat16), (8, 66, torch.bfloat16), (8, 64, torch.float32)):
        assert not takes_words(torch.empty(rows, in_dim, dtype=dtype))
    assert [choose_splits(*shape) for shape in ((3072, 2048), (2048, 8192), (16384, 2048), (64, 16384))] == [2, 8, 1, 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("adds", "norms", "gated"), VARIANTS)
def test_one_row(kind: Kind, dtype: torch.dtype, adds: bool, norms: bool, gated: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    for out_dim, in_dim in ((54, 272), (36, 1160)):
        x = made(3, in_dim + 8, dtype=dtype, device=device)[1:2, :in_dim]
        weight = coded(kind, out_dim, in_dim, device)
        residual = made(1, out_dim, dtype=dtype, device=device) if adds else None
        norm = (made(in_dim, dtype=dtype, device=device), torch.tensor(1e-5, device=device)) if norms else None
        wide_norm = None if norm is None else (norm[0].double(), norm[1].double())
        wide = None if residual is None else residual.double()
        expected = skinny_linear_ref(x.double(), decode_ref(weight, torch.float64), wide, wide_norm, gated)
        got = quantised_one_row_triton(x, weight, residual, norm, gated)
        assert residual is None or got is residual
        rtol, atol = OP[dtype]
        torch.testing.assert_close(got, expected.to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 16, 37, 130])
@pytest.mark.parametrize(("adds", "gated", "splits"), [(0, 0, 1), (1, 0, 4), (0, 1, 1), (0, 1, 2), (0, 0, 8)])
def test_some_rows(kind: Kind, rows: int, adds: int, gated: int, splits: int, device: torch.device) -> None:
    """Rows and columns that fill no tile, parts that get nothing, x and the residual as views."""
    torch.manual_seed(2)
    x = made(rows + 2, 728, dtype=torch.bfloat16, device=device)[1 : rows + 1, :720]
    weight = coded(kind, 152, 720, device)
    residual = made(rows, 152, dtype=torch.bfloat16, device=device) if adds else None
    wide = None if residual is None else residual.double()
    expected = skinny_linear_ref(x.double(), decode_ref(weight, torch.float64), wide, None, bool(gated)).to(x.dtype)
    arrivals = torch.zeros(64, dtype=torch.int32, device=device)
    cut = {**choose_cut(rows, 152, 720), "SPLITS": splits}

    def run(first: int) -> torch.Tensor:
        mine = None if residual is None else residual[first:].clone()
        return quantised_rows_triton(x[first:], weight, mine, bool(gated), arrivals, cut)

    got = run(0)
    rtol, atol = OP[x.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    assert not arrivals.any()
    assert torch.equal(run(0), got)
    assert torch.equal(run(1), got[1:])  # a row does not depend on the others


def test_float32(device: torch.device) -> None:
    x, weight = made(3, 96, dtype=torch.float32, device=device), coded("int8", 70, 96, device)
    expected = (x.double() @ decode_ref(weight, torch.float64).t()).float()
    rtol, atol = OP[torch.float32]
    torch.testing.assert_close(quantised_rows_triton(x, weight), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_storage_multiplies_as_a_plain_one_of_the_decoded_weights(
    kind: Kind, bias: bool, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way in which layers call it, through the kernels."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", dispatch.TRITON_DEVICES | {device.type})
    torch.manual_seed(4)
    dtype, widths = torch.bfloat16, (40, 40)
    settings: dict[str, Any] = {"bias": bias, "dtype": dtype, "device": device}
    quantised, plain = QuantisedStorage(kind, 144, widths, **settings), DenseStorage(144, widths, **settings)
    for coded_part, part in zip(quantised.parameters(), plain.parameters(), strict=True):
        weight = made(40, 144, dtype=torch.float32, device=device)
        coded_part["weight"].load(weight)
        codes, scales = coded_part["weight"].destination, coded_part["weight"].scales
        assert scales is not None
        part["weight"].load(decode_ref(Coded(codes, scales), torch.float32))
        if bias:
            values = made(40, dtype=dtype, device=device)
            coded_part["bias"].load(values)
            part["bias"].load(values)
    x, y = made(rows, 144, dtype=dtype, device=device), made(rows, 80, dtype=dtype, device=device)
    norm = (made(144, dtype=dtype, device=device), torch.tensor(1e-5, device=device))

    def results(storage: DenseStorage | QuantisedStorage) -> list[torch.Tensor]:
        onto = y.clone()
        storage.add_matmul(onto, x)
        return [storage.matmul(x), storage.matmul(x, norm), storage.matmul(x, norm, gated=True), onto]

    rtol, atol = MODEL[dtype]  # the plain weights are rounded once more
    for got, expected in zip(results(quantised), results(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
