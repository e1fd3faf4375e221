"""Attention over scattered pages, through the public entry; `attention_decode` and `attention_prefill` say of what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, relative
from specserve_kernels.attention.paged import AttentionMetadata, AttentionShape, paged_attention, prepare

BLOCK = 16
TAIL = 1024
"""So many queries of a sequence, its last, are checked: the reference may need memory for every pair."""


def metadata(sequences: Sequence[tuple[int, int]], device: torch.device) -> AttentionMetadata:
    """Of sequences of (tokens in the cache before, queries), their pages in random order; page 0 is padding's."""
    lengths = [before + queries for before, queries in sequences]
    pages = [-(-length // BLOCK) for length in lengths]
    order = torch.split(torch.randperm(sum(pages)) + 1, pages)
    tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).to(device)
    positions = torch.cat([torch.arange(n - queries, n) for n, (_, queries) in zip(lengths, sequences, strict=True)])
    counts = torch.tensor([queries for _, queries in sequences])
    owners = torch.arange(len(sequences)).repeat_interleave(counts).to(device)
    positions = positions.to(device)
    slots = tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device)
    rows = torch.arange(len(sequences), device=device)
    return AttentionMetadata(positions, slots, tables, rows, starts, tuple(counts.tolist()), tuple(lengths), BLOCK)


def case(setting: Setting, name: str, sequences: Sequence[tuple[int, int]]) -> Case:
    model, meta = setting.shape, metadata(sequences, setting.device)
    shape = AttentionShape(model.heads, model.kv_heads, model.head_dim, torch.bfloat16)
    tokens, keys = len(meta.positions), sum(meta.context_bounds)
    size = 2 * 2 * (keys * model.kv_heads + tokens * model.heads) * model.head_dim
    pairs = sum(queries * before + queries * (queries + 1) / 2 for before, queries in sequences)
    cache = ((int(meta.block_tables.max()) + 1) * BLOCK, model.kv_heads, model.head_dim)
    q = setting.randn(tokens, model.heads + 2 * model.kv_heads, model.head_dim)[:, : model.heads]
    prepared, scale = prepare(meta, shape), model.head_dim**-0.5
    caches: list[tuple[Tensor, Tensor]] = copies(lambda: (setting.randn(*cache), setting.randn(*cache)), size)
    calls = [partial(paged_attention, q, k, v, prepared, scale) for k, v in caches]

    def error() -> float:
        tails = [(before + queries - min(queries, TAIL), min(queries, TAIL)) for before, queries in sequences]
        last = replace(metadata(tails, setting.device), block_tables=meta.block_tables)
        ends = meta.query_start[1:].tolist()
        checked = torch.cat([torch.arange(end - n, end) for end, (_, n) in zip(ends, tails, strict=True)])
        reference, (k, v) = prepare(last, replace(shape, dtype=torch.float32), "torch"), caches[0]
        want = paged_attention(q[checked].float(), k.float(), v.float(), reference, scale)
        return relative(calls[0]()[checked], want)

    return Case(name, calls, size, error, flops=4 * pairs * model.heads * model.head_dim)
