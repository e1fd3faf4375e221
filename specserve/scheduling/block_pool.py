"""BlockPool: who owns which KV block, and which blocks still hold a known prefix.

A block is *used* (ref_count > 0), or *free*. A free block may still be *cached*: its hash finds it until it is handed
out again. Free blocks leave in least-recently-used order. Block 0 is never handed out: padded, undrafted and over-long
tokens write there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 reserved."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "the pool needs block 0 and at least one more"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.draft_filled = [False] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with ref_count 1, or None if there are not that many; what they had cached is forgotten."""
        if count > len(self._free):
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self.ref_counts[block] = 1
        return block

    def _forget(self, block: int) -> None:
        block_hash = self.hashes[block]
        if block_hash is not None:
            del self._cached[block_hash]
            self.hashes[block] = None
        self.draft_filled[block] = False

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this prefix, used or free."""
        return self._cached.get(block_hash)

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each; a free one leaves the free list."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._free[block]
            self.ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner fewer for each. Last blocks first, so that a prefix outlives its tail."""
        for block in reversed(blocks):
            assert self.ref_counts[block] > 0, f"block {block} released twice"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None
                if self.hashes[block] is None:  # nothing to find there: first to go
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, block_hash: bytes) -> None:
        """Let `block_hash` find `block`; the first block that holds a prefix keeps it."""
        if self.hashes[block] is None and block_hash not in self._cached:
            self._cached[block_hash] = block
            self.hashes[block] = block_hash

    def clear_cache(self) -> None:
        """Forget every cached prefix; used blocks stay with their owners."""
        for block in list(self._cached.values()):
            block_hash = self.hashes[block]
            assert block_hash is not None
            del self._cached[block_hash]
            self.hashes[block] = None

    def check_integrity(self, owners: Iterable[list[int]]) -> None:
        """Assert that ref counts are what `owners` (each a block list) say and that nothing leaked."""
        counts = [0] * self.num_blocks
        for blocks in owners:
            for block in blocks:
                counts[block] += 1
        assert counts == self.ref_counts, "ref counts differ from the requests' block lists"
        assert counts[NULL_BLOCK] == 0, "block 0 was handed out"
        free = {block for block in range(1, self.num_blocks) if counts[block] == 0}
        assert free == set(self._free), "free list differs from the unowned blocks"
        for block_hash, block in self._cached.items():
            assert self.hashes[block] == block_hash, "cache and block hashes differ"
        assert sum(h is not None for h in self.hashes) == len(self._cached), "a hash is not in the cache"
