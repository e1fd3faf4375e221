"""Attention that takes raw qkv against rotate_and_cache and then attention: the same outputs, and the same caches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from specserve_kernels.attention.decode import Tile, prepare_decode
from specserve_kernels.attention.interface import SHORT_QUERY, AttentionMetadata, AttentionShape
from specserve_kernels.attention.paged import MOST_FUSED, PreparedAttention, paged_attention, prepare, qkv_attention
from specserve_kernels.qkv import HeadWeights, rotate_and_cache_ref, rotate_and_cache_triton
from specserve_kernels.tolerances import OP

SMALL = Tile(16, 4, 3, 3)  # so that few keys are many parts
DECODES = ((6, 1), (0, 1), (90, 1))
VERIFICATIONS = ((60, 5), (14, 5), (30, 1), (0, 3))
STRADDLING = ((126, 4), (127, 2), (250, 16))  # of parts of 128 keys


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens before, queries); layers, one a window, share what is prepared.

    `ragged`: (tokens, sequences) of room beyond what is there. `overrun`: so many last tokens of the first sequence
    stand at its last position and go to block 0, as tokens beyond a model's length do.
    """

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    windows: tuple[int | None, ...] = (None,)
    normed: bool = False
    finite: bool = False
    ragged: tuple[int, int] | None = None
    overrun: int = 0

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.dtype)


@dataclass(frozen=True)
class Layers:
    """What all layers of a forward share, and of each layer (k_cache, v_cache) and raw qkv."""

    meta: AttentionMetadata
    cos: Tensor
    sin: Tensor
    norm: HeadWeights | None
    caches: list[tuple[Tensor, Tensor]]
    qkv: list[Tensor]


def metadata(case: Case) -> AttentionMetadata:
    """Of shuffled blocks, on the CPU. Block 0 and its row are padding's; tokens beyond the sequences go there."""
    generator = torch.Generator().manual_seed(0)
    lengths = [before + queries for before, queries in case.sequences]
    width = -(-max(lengths) // case.block_size) + 1
    blocks = (torch.randperm(width * len(lengths), generator=generator) + 1).view(len(lengths), width)
    tables = torch.cat((torch.zeros(1, width, dtype=torch.int64), blocks))
    positions = torch.cat([torch.arange(before, before + queries) for before, queries in case.sequences])
    counts = [queries for _, queries in case.sequences]
    rows = torch.randperm(len(lengths), generator=generator) + 1
    owners = rows.repeat_interleave(torch.tensor(counts))
    slots = tables[owners, positions // case.block_size] * case.block_size + positions % case.block_size
    last = counts[0] - case.overrun - 1
    positions[last : counts[0]] = positions[last].clone()
    slots[last + 1 : counts[0]] %= case.block_size
    starts = torch.tensor([0, *itertools.accumulate(counts)])
    meta = AttentionMetadata(positions, slots, tables, rows, starts, tuple(counts), tuple(lengths), case.block_size)
    if case.ragged is None:
        return meta
    tokens, empty = case.ragged
    pad = torch.nn.functional.pad
    return replace(
        meta, positions=pad(positions, (0, tokens)), slot_mapping=pad(slots, (0, tokens)), rows=pad(rows, (0, empty)),
        query_start=pad(starts, (0, empty), value=int(starts[-1])), query_lens=None,
        context_bounds=(max(lengths),) * (len(lengths) + empty), max_query_len=max(counts),
    )  # fmt: skip


def make(case: Case, device: torch.device, meta: AttentionMetadata) -> Layers:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    tokens, slots = len(meta.positions), (int(meta.block_tables.max()) + 1) * case.block_size
    angles = torch.rand(tokens, 1, case.head_dim // 2, generator=generator) * 6.28
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    norm = (normal(case.heads + case.kv_heads, case.head_dim), torch.tensor(1e-6, device=device))
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    qkv = [normal(tokens, width) for _ in case.windows]
    if case.finite:
        for number, x in zip((float("nan"), float("inf"), -float("inf")), (5, 7, 11), strict=True):
            for each in qkv:
                each.view(-1)[x :: 6 * x] = number
    caches = [normal(2, slots, case.kv_heads, case.head_dim).unbind(0) for _ in case.windows]
    names = ("positions", "slot_mapping", "block_tables", "rows", "query_start")
    meta = replace(meta, **{name: getattr(meta, name).to(device) for name in names})
    return Layers(meta, cos.to(device, case.dtype), sin.to(device, case.dtype), norm if case.normed else None,
                  [(k, v) for k, v in caches], qkv)  # fmt: skip


def prepared(case: Case, meta: AttentionMetadata, tile: Tile | None, *, fused: bool) -> PreparedAttention:
    ready = prepare(meta, case.shape, "triton", fused=fused)
    if tile is None:
        return ready
    (run,) = ready.content.runs
    run = prepare_decode(meta, case.shape, 0, len(meta.rows), run.queries, tile)
    return replace(ready, content=replace(ready.content, runs=(run,)))


def run(case: Case, layers: Layers, tile: Tile | None, *, fused: bool) -> list[Tensor]:
    """Each layer's output [T, heads, head_dim]; caches are written and qkv used up."""
    ready, scale, outs = prepared(case, layers.meta, tile, fused=fused), case.head_dim**-0.5, []
    assert ready.takes_qkv == fused
    for window, (k, v), qkv in zip(case.windows, layers.caches, layers.qkv, strict=True):
        if fused:
            out = qkv_attention(qkv, layers.cos, layers.sin, k, v, ready, scale, window,
                                norm=layers.norm, finite=case.finite)  # fmt: skip
        else:
            q = rotate_and_cache_triton(qkv, layers.cos, layers.sin, k, v, layers.meta.slot_mapping,
                                        heads=case.heads, norm=layers.norm, finite=case.finite)  # fmt: skip
            out = paged_attention(q, k, v, ready, scale, window)
        outs.append(out.clone())  # a ragged forward's layers share it
    return outs


def check(case: Case, device: torch.device, tile: Tile | None = None) -> None:
    """Compiled, a product and a sum may be one operation in one kernel and two in the other; so may a norm's sum be
    taken in another order. Else bits are equal."""
    meta = metadata(case)
    two, one = make(case, device, meta), make(case, device, meta)
    expected, actual = run(case, two, tile, fused=False), run(case, one, tile, fused=True)
    rtol, atol = OP[case.dtype] if case.normed or device.type == "cuda" else (0.0, 0.0)
    count = sum(queries for _, queries in case.sequences)
    for out, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(out[:count], wanted[:count], rtol=rtol, atol=atol)
        assert out[:count].isfinite().all() and not out[count:].any()
    for mine, theirs in zip(one.caches, two.caches, strict=True):
        for cache, wanted in zip(mine, theirs, strict=True):  # block 0 is the bin: order and number of writes are free
            torch.testing.assert_close(cache[case.block_size :], wanted[case.block_size :], rtol=rtol, atol=atol)
            assert cache.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sequences", "tile"), [(DECODES, SMALL), (VERIFICATIONS, SMALL), (STRADDLING, None)])
def test_one_kernel_is_two(
    sequences: tuple[tuple[int, int], ...], dtype: torch.dtype, tile: Tile | None, device: torch.device
) -> None:
    check(Case(sequences, dtype=dtype), device, tile)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_norms_and_what_is_not_finite(
    normed: bool, finite: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check(Case(VERIFICATIONS, dtype=dtype, normed=normed, finite=finite), device, SMALL)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (12, 4)])
def test_groups(heads: int, kv_heads: int, device: torch.device) -> None:
    check(Case(VERIFICATIONS, heads, kv_heads, windows=(None, 20)), device, SMALL)


def test_more_rows_than_a_tile(device: torch.device) -> None:
    check(Case(((60, 16), (41, 3)), 8, 1, dtype=torch.bfloat16, normed=True), device)
    check(Case(((60, 16), (41, 3)), 3, 1), device, SMALL)


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims_with_the_tiles_of_production(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Case(((140, 4), (20, 1)), head_dim=head_dim, dtype=dtype), device)


@pytest.mark.parametrize("block_size", [1, 5, 32, 256])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(Case(VERIFICATIONS, block_size=block_size), device, SMALL)


def test_windows_of_one_forward(device: torch.device) -> None:
    check(Case(VERIFICATIONS, windows=(7, None, 1, 40, 1000, 7)), device, SMALL)


@pytest.mark.parametrize("room", [(0, 0), (7, 0), (0, 3), (33, 70)])
def test_ragged(room: tuple[int, int], device: torch.device) -> None:
    check(Case(VERIFICATIONS, windows=(None, 4), ragged=room, finite=True), device, SMALL)


def test_a_row_of_one_token_computes_it_twice(device: torch.device) -> None:
    """Both at position 0, with equal rows of qkv, as the draft's first pass has them."""
    case = Case(((40, 2), (0, 2), (9, 2)))
    meta = metadata(case)
    for name in ("positions", "slot_mapping"):
        getattr(meta, name)[3] = getattr(meta, name)[2]
    results = []
    for fused in (False, True):
        layers = make(case, device, meta)
        for each in (layers.qkv[0], layers.cos, layers.sin):
            each[3] = each[2]
        (out,) = run(case, layers, SMALL, fused=fused)
        results.append((out, *layers.caches[0]))
        torch.testing.assert_close(out[2], out[3], rtol=0.0, atol=0.0)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, **exactly(device))


def test_padding_rows_share_the_bin(device: torch.device) -> None:
    """Rows of a graph that nobody has: two tokens at position 0 of block 0, each with numbers of its own."""
    case = Case(((40, 2), (0, 2), (0, 2), (30, 2)))
    meta = metadata(case)
    meta.rows[1:3] = 0
    meta.positions[2:6] = meta.slot_mapping[2:6] = 0
    results = []
    for fused in (False, True):
        layers = make(case, device, meta)
        (out,) = run(case, layers, None, fused=fused)
        assert out.isfinite().all()
        results.append((out[:2], out[6:], *(cache[case.block_size :] for cache in layers.caches[0])))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, **exactly(device))


def test_tokens_beyond_a_models_length(device: torch.device) -> None:
    check(Case(((40, 5), (9, 3)), overrun=2), device, SMALL)


def exactly(device: torch.device) -> dict[str, float]:
    rtol, atol = OP[torch.float32] if device.type == "cuda" else (0.0, 0.0)
    return {"rtol": rtol, "atol": atol}


@pytest.mark.parametrize("normed", [False, True])
def test_the_reference_in_float64(normed: bool, device: torch.device) -> None:
    case = Case(VERIFICATIONS, 6, 2, 64, normed=normed, finite=True)
    layers = make(case, device, metadata(case))
    wide = [tensor.double() for tensor in (layers.qkv[0], layers.cos, layers.sin, *layers.caches[0])]
    norm = None if layers.norm is None else (layers.norm[0].double(), layers.norm[1].double())
    slots = layers.meta.slot_mapping
    q = rotate_and_cache_ref(*wide, slots, heads=6, norm=norm, finite=True)
    reference = prepare(layers.meta, replace(case.shape, dtype=torch.float64), "torch")
    expected = paged_attention(q, *wide[3:], reference, 64**-0.5)
    (out,) = run(case, layers, None, fused=True)
    rtol, atol = OP[torch.float32]
    for mine, wanted in zip((out, *layers.caches[0]), (expected, *wide[3:]), strict=True):
        torch.testing.assert_close(mine, wanted.to(mine.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("ragged", [None, (0, 2)])
def test_who_takes_raw_qkv(ragged: tuple[int, int] | None) -> None:
    """Forwards of short sequences alone, and none where the reference computes; by itself those of few tokens."""

    def takes(backend: str, *sequences: tuple[int, int], fused: bool | None = True) -> bool:
        case = Case(sequences, ragged=None if backend == "torch" else ragged)
        return prepare(metadata(case), case.shape, backend, fused=fused).takes_qkv

    assert takes("triton", (5, 1), (9, SHORT_QUERY))
    assert not takes("triton", (5, 1), (9, SHORT_QUERY + 1))
    assert not takes("triton", (5, 1), fused=False)
    assert takes("triton", *[(5, 1)] * MOST_FUSED, fused=None)
    assert not takes("triton", *[(5, 1)] * (MOST_FUSED + 1), fused=None)
    assert not takes("torch", (5, 1))
