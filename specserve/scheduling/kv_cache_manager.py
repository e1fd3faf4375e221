"""KVCacheManager: gives requests their blocks, finds and registers shared prefixes."""

from __future__ import annotations

from dataclasses import dataclass

from specserve.scheduling.block_pool import BlockPool
from specserve.scheduling.prefix_cache import extend_hashes
from specserve.scheduling.request import Request


@dataclass(slots=True)
class PrefixStats:
    """Tokens looked up and found since start."""

    queries: int = 0
    hits: int = 0


class KVCacheManager:
    """Block lists of requests over one BlockPool. Target and draft share block ids; the tensors are the runner's."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = PrefixStats()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """Blocks that already hold the head of the request's tokens, in order; taken by nobody yet."""
        if not self.enable_prefix_caching:
            return []
        assert request.root is not None
        extend_hashes(request.block_hashes, request.root, request.token_ids, self.block_size)
        blocks: list[int] = []
        for block_hash in request.block_hashes:
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def admit(self, request: Request) -> bool:
        """Give a request its cached prefix if the rest of its tokens fits beside it; False leaves all as it was."""
        blocks = self.find_prefix(request)
        self.pool.share(blocks)
        if self.blocks_for(request.num_tokens) - len(blocks) > self.pool.num_free:
            self.pool.release(blocks)
            return False
        request.block_ids = blocks
        request.num_registered = len(blocks)
        # A whole hit still computes the last token: its logits are what the request came for.
        request.num_computed_tokens = min(len(blocks) * self.block_size, request.num_tokens - 1)
        filled = 0
        while filled < len(blocks) and self.pool.draft_filled[blocks[filled]]:
            filled += 1
        request.num_draft_computed_tokens = min(filled * self.block_size, request.num_tokens - 1)
        request.num_draft_scheduled_tokens = request.num_draft_computed_tokens
        self.stats.queries += request.num_tokens
        self.stats.hits += request.num_computed_tokens
        return True

    def can_grow(self, request: Request, num_tokens: int) -> bool:
        """Whether the pool has the blocks that `num_tokens` need."""
        return self.blocks_for(num_tokens) - len(request.block_ids) <= self.pool.num_free

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks appended so that `num_tokens` fit; None if the pool lacks them (nothing changes)."""
        missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return []
        blocks = self.pool.allocate(missing)
        if blocks is not None:
            request.block_ids.extend(blocks)
        return blocks

    def commit(self, request: Request, num_computed: int) -> None:
        """Offer full blocks of committed, computed tokens to the prefix cache; note which the draft has filled."""
        if not self.enable_prefix_caching:
            return
        assert request.root is not None
        full = min(num_computed, request.num_tokens) // self.block_size
        if full > request.num_registered:
            extend_hashes(request.block_hashes, request.root, request.token_ids, self.block_size)
        for index in range(request.num_registered, full):
            self.pool.register(request.block_ids[index], request.block_hashes[index])
        request.num_registered = max(full, request.num_registered)

    def commit_draft(self, request: Request, num_draft_computed: int) -> None:
        """The draft's KV is right for the first `num_draft_computed` tokens: mark the blocks that became full."""
        first = request.num_draft_computed_tokens // self.block_size
        last = min(num_draft_computed // self.block_size, len(request.block_ids))
        for index in range(first, last):
            self.pool.draft_filled[request.block_ids[index]] = True
        request.num_draft_computed_tokens = num_draft_computed
        request.num_draft_scheduled_tokens = max(request.num_draft_scheduled_tokens, num_draft_computed)

    def release(self, request: Request) -> None:
        """Take all blocks back; full registered ones stay findable until reused."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_registered = 0
        request.num_computed_tokens = 0
        request.num_draft_computed_tokens = 0
        request.num_draft_scheduled_tokens = 0
