"""Attention over a paged KV cache, for any mix of prefill chunks, decodes and verifications in one batch.

    out[t] = softmax(scale · q[t] K[0..p]ᵀ) V[0..p],   p = positions[t], K and V those of t's own sequence.

q: [T, heads, head_dim]; k_cache, v_cache: [num_blocks * block_size, kv_heads, head_dim]; heads = groups * kv_heads,
and query head h reads KV head h // groups. The keys of the T tokens themselves are in the cache already.

The reference gathers whole blocks, so a sequence's keys are padded to a multiple of the block size, and a mask made
from the true positions hides what lies beyond. All that depends on the step alone (which blocks, which mask) is
prepared once and shared by the layers. Sequences with few queries are padded into one batch; long prefill chunks are
computed each on their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.dispatch import backend

SHORT_QUERY = 16
"""Sequences with at most this many queries (decodes, verifications) share a padded batch."""
MAX_PADDING = 4
"""Padded queries of a shared batch per real one, at most; beyond that a second batch is cheaper."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the T tokens of one forward stand; B sequences, whose tokens follow one another in the batch."""

    positions: Tensor  # [T] int64, true positions (device); padding tokens have position 0 and slot 0
    slot_mapping: Tensor  # [T] int64 into the flattened cache; in block 0 for padding
    block_tables: Tensor  # [B, max_blocks] int64, one row a sequence of this forward, in token order
    query_lens: tuple[int, ...]  # host, per sequence, each >= 1; sum = T
    context_bounds: tuple[int, ...]  # host upper bound of KV length per sequence after this forward
    block_size: int


@dataclass(frozen=True, slots=True)
class QueryBatch:
    """Sequences computed together: S sequences, their queries padded to Q, their keys to K = blocks * block_size."""

    first_token: int
    last_token: int  # exclusive
    num_seqs: int
    query_len: int  # Q
    packed: bool  # True: a KV head's groups are queries of one head; False: one sequence, groups are heads
    blocks: Tensor  # [S * blocks] int64
    mask: Tensor  # additive, 0 or -inf: packed [S, 1, Q * groups or 1, K], else [1, 1, Q, K]
    pad: Tensor | None  # [S * Q] int64: token of the batch that fills a padded place; None: nothing to pad
    unpad: Tensor | None  # [tokens] int64: padded place of each token


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """What all layers of one forward share; made by `prepare`."""

    batches: tuple[QueryBatch, ...]
    slot_mapping: Tensor  # [T] int64
    block_size: int


def prepare(meta: AttentionMetadata, *, groups: int, dtype: torch.dtype) -> PreparedAttention:
    """Compute once what every layer needs; `groups` = query heads per KV head, `dtype` that of the queries."""
    assert len(meta.query_lens) == len(meta.context_bounds) == meta.block_tables.shape[0], meta
    assert sum(meta.query_lens) == meta.positions.shape[0] == meta.slot_mapping.shape[0], meta
    batches = []
    token = 0
    for first, last in _runs(meta.query_lens):
        batches.append(_batch(meta, first, last, token, groups, dtype))
        token = batches[-1].last_token
    return PreparedAttention(tuple(batches), meta.slot_mapping, meta.block_size)


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


def _batch(meta: AttentionMetadata, first: int, last: int, token: int, groups: int, dtype: torch.dtype) -> QueryBatch:
    lens = meta.query_lens[first:last]
    num_seqs, query_len, device = last - first, max(lens), meta.positions.device
    num_blocks = -(-max(meta.context_bounds[first:last]) // meta.block_size)
    assert num_blocks <= meta.block_tables.shape[1], "context bound beyond the block table"
    blocks = meta.block_tables[first:last, :num_blocks].reshape(-1)
    positions = meta.positions[token : token + sum(lens)]
    pad = unpad = None
    if sum(lens) < num_seqs * query_len:
        pad, unpad = _padding(lens, query_len, device)
        positions = positions[pad]
    packed = query_len <= SHORT_QUERY
    places = positions.view(num_seqs, 1, query_len, 1)
    if packed and query_len > 1 and groups > 1:
        places = places.expand(-1, -1, -1, groups).reshape(num_seqs, 1, query_len * groups, 1)
    keys = torch.arange(num_blocks * meta.block_size, device=device)
    mask = torch.zeros((*places.shape[:3], keys.shape[0]), dtype=dtype, device=device)
    mask.masked_fill_(keys > places, float("-inf"))
    return QueryBatch(token, token + sum(lens), num_seqs, query_len, packed, blocks, mask, pad, unpad)


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


def paged_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedAttention, scale: float
) -> Tensor:
    outs = []
    for batch in prepared.batches:
        queries = q if len(prepared.batches) == 1 else q[batch.first_token : batch.last_token]
        k = _gather(k_cache, batch, prepared.block_size)
        v = _gather(v_cache, batch, prepared.block_size)
        attend = _attend_packed if batch.packed else _attend_long
        outs.append(attend(queries, k, v, batch, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _gather(cache: Tensor, batch: QueryBatch, block_size: int) -> Tensor:
    """Blocks of all sequences of the batch → [S, K, kv_heads, head_dim]."""
    _, kv_heads, head_dim = cache.shape
    rows = cache.view(-1, block_size * kv_heads * head_dim).index_select(0, batch.blocks)
    return rows.view(batch.num_seqs, -1, kv_heads, head_dim)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, batch: QueryBatch, scale: float) -> Tensor:
    """Few queries a sequence: K and V are read once per KV head, with its groups as further queries."""
    seqs, length, kv_heads, head_dim = batch.num_seqs, batch.query_len, k.shape[2], k.shape[3]
    groups = q.shape[1] // kv_heads
    if batch.pad is not None:
        q = q.index_select(0, batch.pad)
    q = q.view(seqs, length, kv_heads, groups, head_dim).transpose(1, 2)
    q = q.reshape(seqs, kv_heads, length * groups, head_dim)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), batch.mask, scale=scale)
    out = out.view(seqs, kv_heads, length, groups, head_dim).transpose(1, 2)
    out = out.reshape(seqs * length, kv_heads * groups, head_dim)
    return out if batch.unpad is None else out.index_select(0, batch.unpad)


def _attend_long(q: Tensor, k: Tensor, v: Tensor, batch: QueryBatch, scale: float) -> Tensor:
    """One long chunk: KV heads take the batch's place and groups that of heads; nothing is copied or repeated."""
    kv_heads, head_dim = k.shape[2], k.shape[3]
    groups = q.shape[1] // kv_heads
    q = q.view(batch.query_len, kv_heads, groups, head_dim).permute(1, 2, 0, 3)
    k = k.permute(2, 0, 1, 3).expand(-1, groups, -1, -1)
    v = v.permute(2, 0, 1, 3).expand(-1, groups, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, batch.mask, scale=scale)  # [kv_heads, groups, Q, head_dim]
    return out.permute(2, 0, 1, 3).reshape(batch.query_len, kv_heads * groups, head_dim)


_IMPLEMENTATIONS = {"torch": paged_attention_ref}


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedAttention, scale: float) -> Tensor:
    """Attention of q [T, heads, head_dim] over the caches → [T, heads, head_dim].

    q must be sliceable as [T, heads, head_dim] views (contiguous in its last two dimensions). Cache entries beyond a
    sequence's length may hold anything finite.
    """
    assert q.shape[1] % k_cache.shape[1] == 0 and q.shape[2] == k_cache.shape[2], (q.shape, k_cache.shape)
    return _IMPLEMENTATIONS[backend(q, _IMPLEMENTATIONS)](q, k_cache, v_cache, prepared, scale)
