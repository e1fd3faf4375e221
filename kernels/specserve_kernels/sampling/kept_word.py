"""The best of a tile's tokens that top_k and top_p leave, which are few: noise is drawn where one of them stands."""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.sampling.cut import load_logits, stays
from specserve_kernels.sampling.noise import gumbel
from specserve_kernels.sampling.ordered import NO_WORD, best_word

KEPT_WARPS = 1  # of programs that call this: nothing then waits for another warp
_BLOCK = tl.constexpr(256)


@triton.jit
def _load_kept(logits, at, token, vocab, divisor, row, threshold, last_id, DIVIDED: tl.constexpr):
    x = load_logits(logits, at + token, token < vocab, divisor, row, DIVIDED)
    return tl.where(stays(x, token, threshold, last_id), x, float("-inf"))


@triton.jit
def best_kept_word(
    logits, at, first, vocab, divisor, row, threshold, last_id, key, is_noisy,
    DIVIDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best word of TILE tokens from id `first` on, NO_WORD if none stays; at: the place of the row's token 0.

    All are read at once; those of a block where some stay are read again, from the cache.
    """
    block = tl.arange(0, TILE // _BLOCK)
    inner = tl.arange(0, _BLOCK)
    token = first + block[:, None] * _BLOCK + inner[None, :]
    x = _load_kept(logits, at, token, vocab, divisor, row, threshold, last_id, DIVIDED)
    largest = tl.max(x, axis=1)  # [TILE / 256]
    best = tl.full((), NO_WORD, tl.int64)
    for i in range(TILE // _BLOCK):
        if tl.max(tl.where(block == i, largest, float("-inf")), axis=0) > float("-inf"):
            ids = first + i * _BLOCK + inner
            kept = _load_kept(logits, at, ids, vocab, divisor, row, threshold, last_id, DIVIDED)
            if is_noisy:
                kept += gumbel(key, ids)
            best = tl.maximum(best, best_word(kept, ids))
    return best
