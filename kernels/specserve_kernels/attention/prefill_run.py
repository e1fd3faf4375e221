"""Which kernel computes the prefill attention, and what it is told once for all layers of a forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specserve_kernels.attention import prefill_hopper as attention_prefill_hopper
from specserve_kernels.attention.interface import AttentionMetadata, AttentionShape
from specserve_kernels.attention.plan import multiprocessors
from specserve_kernels.attention.prefill import prefill_attention_triton
from specserve_kernels.attention.prefill_tiles import TileList, list_tiles

_STAY = 4096
"""Keys up to which programs of attention_prefill_hopper stay for several tiles: their starts would take longer than the
tiles. With more keys it matters that the GPU gives the next tile to the program that is free first."""


@dataclass(slots=True)
class HopperRun:
    """What the first layer leaves to the others."""

    tiles: TileList | None = None


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """Sequences first_seq … first_seq + num_seqs - 1 of one forward, without those of fewer than `shortest` queries;
    shared by its layers. `query_lens`: theirs, where the host knows them."""

    meta: AttentionMetadata
    first_seq: int
    num_seqs: int
    query_lens: tuple[int, ...] | None
    shortest: int
    max_query_len: int
    max_context: int
    hopper: HopperRun | None  # where attention_prefill_hopper can run


def prepare_prefill(
    meta: AttentionMetadata, shape: AttentionShape, first_seq: int, num_seqs: int, shortest: int = 1
) -> PrefillRun:
    """Compute what the host must know of the run."""
    chosen = slice(first_seq, first_seq + num_seqs)
    lens = None if meta.query_lens is None else meta.query_lens[chosen]
    bounds = meta.max_query_len if lens is None else max(lens), max(meta.context_bounds[chosen])
    hopper = HopperRun() if attention_prefill_hopper.takes(shape, meta.block_size, meta.positions.device) else None
    return PrefillRun(meta, first_seq, num_seqs, lens, shortest, *bounds, hopper)


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, run: PrefillRun, out: Tensor, scale: float, window: int | None
) -> None:
    """Write the attention of the run's tokens into `out` [T, heads, head_dim]; q of the same shape."""
    meta, hopper = run.meta, run.hopper
    hides = window is not None and run.max_context > window
    if hopper is not None and not hides and k_cache.is_contiguous() and v_cache.is_contiguous():
        if hopper.tiles is None:
            hopper.tiles = list_tiles(
                meta.query_start, meta.rows, meta.positions, run.query_lens, run.first_seq,
                attention_prefill_hopper.tile_queries(q.shape[1] // k_cache.shape[1]), shortest=run.shortest,
            )  # fmt: skip
        stay = run.max_context <= _STAY or run.query_lens is None  # most that there is room for may not exist
        programs = multiprocessors(q.device) if stay else None
        attention_prefill_hopper.prefill_attention_hopper(
            q, k_cache, v_cache, meta.block_tables, hopper.tiles, out,
            block_size=meta.block_size, scale=scale, programs=programs,
        )  # fmt: skip
        return
    prefill_attention_triton(
        q, k_cache, v_cache, meta.block_tables, meta.rows, meta.query_start, meta.positions, out,
        first_seq=run.first_seq, num_seqs=run.num_seqs, max_query_len=run.max_query_len, max_context=run.max_context,
        block_size=meta.block_size, scale=scale, window=window if hides else None, shortest=run.shortest,
    )  # fmt: skip
