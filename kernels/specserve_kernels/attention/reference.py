"""The reference backend of paged attention, in torch operators alone: it runs on any device and in any dtype.

It gathers whole blocks, so a sequence's keys are padded to a multiple of the block size, and a mask made from the true
positions hides what lies beyond. All that depends on the step alone (which blocks, which mask) is prepared once and
shared by the layers. Sequences with few queries are padded into one batch; long prefill chunks are computed each on
their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.attention.interface import SHORT_QUERY, AttentionMetadata, AttentionShape, Rotation
from specserve_kernels.qkv import rotate_and_cache_ref

MAX_PADDING = 4
"""Padded queries of a shared batch per real one, at most; beyond that a second batch is cheaper."""


@dataclass(frozen=True, slots=True)
class QueryBatch:
    """Sequences computed together: S sequences, their queries padded to Q, their keys to K = blocks * block_size."""

    first_token: int
    last_token: int  # exclusive
    num_seqs: int
    query_len: int  # Q
    packed: bool  # True: a KV head's groups are queries of one head; False: one sequence, groups are heads
    blocks: Tensor  # [S * blocks] int64
    places: Tensor  # int64 positions of the padded queries: packed [S, 1, Q * groups or 1, 1], else [1, 1, Q, 1]
    pad: Tensor | None  # [S * Q] int64: token of the batch that fills a padded place; None: nothing to pad
    unpad: Tensor | None  # [tokens] int64: padded place of each token
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window; additive, 0 or -inf, places × keys


@dataclass(frozen=True, slots=True)
class PreparedReference:
    """What all layers of one forward share."""

    batches: tuple[QueryBatch, ...]
    block_size: int


def takes(shape: AttentionShape, block_size: int) -> bool:
    return True


def prepare(meta: AttentionMetadata, shape: AttentionShape) -> PreparedReference:
    assert meta.query_lens is not None, "the reference must know the lengths"
    batches = []
    token = 0
    for first, last in _runs(meta.query_lens):
        batches.append(_batch(meta, first, last, token, shape))
        token = batches[-1].last_token
    return PreparedReference(tuple(batches), meta.block_size)


def _runs(query_lens: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cut the sequences into consecutive runs [first, last) that are computed together."""
    runs: list[tuple[int, int]] = []
    longest = total = 0
    for i, length in enumerate(query_lens):
        wider = max(longest, length)
        if runs and wider <= SHORT_QUERY and wider * (i + 1 - runs[-1][0]) <= MAX_PADDING * (total + length):
            runs[-1] = (runs[-1][0], i + 1)
            longest, total = wider, total + length
        else:
            runs.append((i, i + 1))
            longest = total = length
    return runs


def _batch(meta: AttentionMetadata, first: int, last: int, token: int, shape: AttentionShape) -> QueryBatch:
    assert meta.query_lens is not None
    lens = meta.query_lens[first:last]
    num_seqs, query_len, device = last - first, max(lens), meta.positions.device
    num_blocks = -(-max(meta.context_bounds[first:last]) // meta.block_size)
    blocks = meta.block_tables[:, :num_blocks].index_select(0, meta.rows[first:last]).reshape(-1)
    positions = meta.positions[token : token + sum(lens)]
    pad = unpad = None
    if sum(lens) < num_seqs * query_len:
        pad, unpad = _padding(lens, query_len, device)
        positions = positions[pad]
    packed = query_len <= SHORT_QUERY
    groups = shape.heads // shape.kv_heads
    places = positions.view(num_seqs, 1, query_len, 1)
    if packed and query_len > 1 and groups > 1:
        places = places.expand(-1, -1, -1, groups).reshape(num_seqs, 1, query_len * groups, 1)
    return QueryBatch(token, token + sum(lens), num_seqs, query_len, packed, blocks, places, pad, unpad)


def _padding(lens: tuple[int, ...], query_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index tensors into and out of the padded batch; a padded place repeats its sequence's last token."""
    pad: list[int] = []
    unpad: list[int] = []
    start = 0
    for i, length in enumerate(lens):
        pad += [start + min(j, length - 1) for j in range(query_len)]
        unpad += range(i * query_len, i * query_len + length)
        start += length
    return torch.tensor(pad, device=device), torch.tensor(unpad, device=device)


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedReference, scale: float, window: int | None
) -> Tensor:
    outs = []
    for batch in prepared.batches:
        queries = q if len(prepared.batches) == 1 else q[batch.first_token : batch.last_token]
        k = _gather(k_cache, batch, prepared.block_size)
        v = _gather(v_cache, batch, prepared.block_size)
        mask = _mask(batch, k.shape[1], window, q.dtype)
        outs.append((_attend_packed if batch.packed else _attend_long)(queries, k, v, batch, mask, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def takes_qkv(prepared: PreparedReference) -> bool:
    return False


def attend_qkv(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedReference, rotation: Rotation, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    cos, sin, slots, norm, finite = rotation
    heads = qkv.shape[1] // k_cache.shape[2] - 2 * k_cache.shape[1]
    q = rotate_and_cache_ref(qkv, cos, sin, k_cache, v_cache, slots, heads=heads, norm=norm, finite=finite)
    return attend(q, k_cache, v_cache, prepared, scale, window)


def _mask(batch: QueryBatch, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """The mask of this window, made by the first layer that has it."""
    if window not in batch.masks:
        places = batch.places
        keys = torch.arange(num_keys, device=places.device)
        hidden = keys > places if window is None else (keys > places) | (keys <= places - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=places.device)
        batch.masks[window] = mask.masked_fill_(hidden, float("-inf"))
    return batch.masks[window]


def _gather(cache: Tensor, batch: QueryBatch, block_size: int) -> Tensor:
    """Blocks of all sequences of the batch → [S, K, kv_heads, head_dim]."""
    _, kv_heads, head_dim = cache.shape
    rows = cache.view(-1, block_size * kv_heads * head_dim).index_select(0, batch.blocks)
    return rows.view(batch.num_seqs, -1, kv_heads, head_dim)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, batch: QueryBatch, mask: Tensor, scale: float) -> Tensor:
    """Few queries a sequence: K and V are read once per KV head, with its groups as further queries."""
    seqs, length, kv_heads, head_dim = batch.num_seqs, batch.query_len, k.shape[2], k.shape[3]
    groups = q.shape[1] // kv_heads
    if batch.pad is not None:
        q = q.index_select(0, batch.pad)
    q = q.view(seqs, length, kv_heads, groups, head_dim).transpose(1, 2)
    q = q.reshape(seqs, kv_heads, length * groups, head_dim)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    out = out.view(seqs, kv_heads, length, groups, head_dim).transpose(1, 2)
    out = out.reshape(seqs * length, kv_heads * groups, head_dim)
    return out if batch.unpad is None else out.index_select(0, batch.unpad)


def _attend_long(q: Tensor, k: Tensor, v: Tensor, batch: QueryBatch, mask: Tensor, scale: float) -> Tensor:
    """One long chunk: KV heads take the batch's place and groups that of heads; nothing is copied or repeated."""
    kv_heads, head_dim = k.shape[2], k.shape[3]
    groups = q.shape[1] // kv_heads
    q = q.view(batch.query_len, kv_heads, groups, head_dim).permute(1, 2, 0, 3)
    k = k.permute(2, 0, 1, 3).expand(-1, groups, -1, -1)
    v = v.permute(2, 0, 1, 3).expand(-1, groups, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)  # [kv_heads, groups, Q, head_dim]
    return out.permute(2, 0, 1, 3).reshape(batch.query_len, kv_heads * groups, head_dim)
