"""BlockPool as a state machine: owners take, share and release blocks; nothing leaks and no prefix is confused."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from specserve.scheduling.block_pool import NULL_BLOCK, BlockPool
from specserve.scheduling.prefix_cache import extend_hashes, root_hash

NUM_BLOCKS = 9


class PoolMachine(RuleBasedStateMachine):
    """Model: what each owner holds, and for each hash the content that was registered under it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.owners: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # block -> hash written by its last exclusive owner

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert NULL_BLOCK not in blocks and len(set(blocks)) == count
            for block in blocks:
                assert self.pool.hashes[block] is None and not self.pool.draft_filled[block]
                self.content.pop(block, None)
            self.owners.append(blocks)

    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def register(self, data: st.DataObject, key: bytes) -> None:
        held = sorted({block for blocks in self.owners for block in blocks})
        if held:
            block = data.draw(st.sampled_from(held))
            before = self.pool.find(key)
            self.pool.register(block, key)
            if before is None and block not in self.content:
                self.content[block] = key
            assert self.pool.find(key) == (before if before is not None else self.pool.find(key))

    @rule(key=st.binary(min_size=1, max_size=1))
    def share(self, key: bytes) -> None:
        block = self.pool.find(key)
        if block is not None:
            assert self.content[block] == key
            self.pool.share([block])
            self.owners.append([block])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.owners:
            blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
            self.pool.release(blocks)

    @invariant()
    def consistent(self) -> None:
        self.pool.check_integrity(self.owners)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_cached_block_goes_first_and_uncached_before_it() -> None:
    pool = BlockPool(4, 4)
    first, second, third = (pool.allocate(1) or [] for _ in range(3))
    pool.register(first[0], b"a")
    pool.register(second[0], b"b")
    for blocks in (second, first, third):
        pool.release(blocks)
    assert pool.allocate(1) == third  # holds nothing worth keeping
    assert pool.allocate(1) == second  # released before first
    assert pool.find(b"a") == first[0]


def test_a_prefix_outlives_its_tail() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.register(blocks[0], b"head")
    pool.register(blocks[1], b"tail")
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find(b"head") is not None and pool.find(b"tail") is None


def test_roots_differ_in_adapter_scale_salt_and_order_of_fields() -> None:
    roots = [
        root_hash([]),
        root_hash([("v1", 1.0)]),
        root_hash([("v1", 0.5)]),
        root_hash([("v2", 1.0)]),
        root_hash([("v1", 1.0), ("v2", 1.0)]),
        root_hash([], "salt"),
        root_hash([], "", ["salt"]),
        root_hash([], "sal", ["t"]),
    ]
    assert len(set(roots)) == len(roots)


def test_hash_chain_depends_on_everything_before_a_block() -> None:
    a: list[bytes] = []
    b: list[bytes] = []
    extend_hashes(a, b"root", [1, 2, 3, 4, 5, 6, 7, 8, 9], 4)
    extend_hashes(b, b"root", [9, 2, 3, 4, 5, 6, 7, 8], 4)
    assert len(a) == len(b) == 2
    assert a[1] != b[1]
    partial: list[bytes] = []
    extend_hashes(partial, b"root", [1, 2, 3, 4], 4)
    extend_hashes(partial, b"root", [1, 2, 3, 4, 5, 6, 7, 8], 4)
    assert partial == a
