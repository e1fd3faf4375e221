"""The device tier: adapter slots as tensors, one pair per linear, and the batches that address them.

Linear i has P parts (modules merged into it); S is the number of slots, R the largest rank. On a CPU part p of slot s
owns rank rows (s * P + p) * R … + R of a [S * P * R, in_features] and b [S * P * R, out_features]; rows of b are zero
outside their part's columns, rows beyond an adapter's rank are zero in both. So the adapter's product over a merged
linear is one pair of matrix products over the rows in use, of their real ranks only.

On a GPU (`grouped`) a lies behind its linear's weights where these have room for it, so that one product gives both. b
is [S * R, out_features]: row s * R + r holds rank r of slot s over all merged columns, the parts' Bᵀ side by side. R is
a multiple of 16 there, and a slot's rows are zero from each module's rank to the adapter's rounded up to 16; what lies
beyond counts for nothing. The ranks of the slots lie on the device: batches are made there, from the slots that the
rows have at the time a graph is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from specserve_adapters.host_adapter import HostAdapter, head_bytes, num_modules, round_up, unpack
from specserve_adapters.spec import LinearSpec
from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv
from specserve_kernels.lora.batch import Factors, LoraBatch
from specserve_kernels.lora.folded import MANY_BLOCKS, MOST_FOLDED
from specserve_kernels.lora.grouped import GroupedLora, SlotFactors, grouped_lora
from specserve_kernels.lora.load import load_slot
from specserve_kernels.lora.tiles import LARGEST_TILE, RANK_BLOCK


class AdapterWork(Enum):
    """How much the adapters of a batch are: none, some, or so many that kernels are launched another way."""

    NONE = "none"
    SOME = "some"
    MANY = "many"


_Shape = tuple[int, int]
RowAdapters = Sequence[tuple[tuple[int, float], ...]]
FEW_BLOCKS = 2
"""Rank blocks of short rows that kernels for prompts alone take along."""
_MAX_BATCHES = 8  # a step of speculation repeats a few shapes: the target's, the first draft pass's, the others'


class AdapterPool:
    """S slots of one model's adapters. Single-threaded; copies go to the current stream.

    `specs` in the order of `model.linears`; `dtype` is the model's. `behind[i]`, on a GPU: memory for linear i's a
    [S * P * R, in_features], or None, or of another size: then it is not for these slots.
    """

    def __init__(
        self,
        specs: Sequence[LinearSpec],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        behind: Sequence[Tensor | None] = (),
    ) -> None:
        self.specs = tuple(specs)
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.slot_ranks = torch.zeros(num_slots, dtype=torch.int64, device=device)  # 0: empty
        self.grouped = backend(torch.empty(0, dtype=dtype, device=device), ("torch", "triton")) == "triton"
        self._rank_stride = round_up(max_rank, RANK_BLOCK) if self.grouped else max_rank
        a_shapes = [(num_slots * len(spec.parts) * self._rank_stride, spec.in_features) for spec in self.specs]
        b_shapes = [
            (num_slots * (1 if self.grouped else len(spec.parts)) * self._rank_stride, spec.out_features)
            for spec in self.specs
        ]
        rooms = [
            room if room is not None and room.shape == shape else None
            for room, shape in zip(behind or [None] * len(a_shapes), a_shapes, strict=True)
        ]
        self.behind = any(room is not None for room in rooms)  # whether some linear's A is
        self._store, self.linears = _allocate(rooms, a_shapes, b_shapes, dtype, device)
        self._slot_factors = [
            SlotFactors(a, b, tuple(width for _, width in spec.parts))
            for spec, (a, b) in zip(self.specs, self.linears, strict=True)
        ]
        self._parts = tuple(len(spec.parts) for spec in self.specs)
        self._ranks = [0] * num_slots
        self._device = torch.device(device)
        self._weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._active: tuple[int, ...] = ()  # the slots of everything that is cached below
        self._rows: dict[int, Tensor] = {}
        self._factors: list[Factors | None] | None = None
        self._batches: dict[tuple[object, object], LoraBatch] = {}
        if self.grouped and num_slots:
            self._prepare_loads()

    def _prepare_loads(self) -> None:
        """What every load needs, made once: the modules' places in the store, and room for one adapter on its way."""
        modules, stride = num_modules(self.specs), self._rank_stride
        largest = sum((len(spec.parts) * spec.in_features + spec.out_features) for spec in self.specs) * self.max_rank
        size = head_bytes(modules) + largest * self._store.element_size()
        self._staging = torch.zeros(size, dtype=torch.uint8, device=self._device)
        rows: list[tuple[int, ...]] = []
        for spec, (a, b) in zip(self.specs, self.linears, strict=True):
            in_features, out_features, parts = spec.in_features, spec.out_features, len(spec.parts)
            # `a` may lie before or behind the store, in memory of its own
            to_a, to_b = ((tensor.data_ptr() - self._store.data_ptr()) // tensor.element_size() for tensor in (a, b))
            for _, width in spec.parts:
                steps = (parts * stride * in_features, stride * out_features)
                rows.append((to_a, to_b, *steps, in_features, width, out_features))
                to_a += stride * in_features
                to_b += width
        self._layout = torch.tensor(rows, dtype=torch.int64).to(self._device)
        self._align = 8 if all(size % 8 == 0 for row in rows for size in row) else 1
        self._load_payload(0, 0)  # empty: Triton compiles the kernel now and not under the first adapter

    @torch.inference_mode()
    def load_slot(self, slot: int, adapter: HostAdapter | None) -> None:
        """Overwrite the whole of `slot` with `adapter`; None empties it. The host does not wait for the device.

        On a GPU all loads of a pool share one piece of memory: they belong on one stream, or behind each other.
        """
        assert 0 <= slot < self.num_slots
        assert adapter is None or adapter.rank <= self.max_rank
        self._forget_batches()
        self._ranks[slot] = adapter.rank if adapter is not None else 0
        if self.grouped:
            if adapter is not None:  # it travels as it lies and is taken apart on the device, however many modules
                places, _ = unpack(adapter.payload, len(self._layout), self._store.dtype)
                assert not (places[:, :2] % self._align).any(), "a module does not begin where the device can read it"
                self._staging[: adapter.payload.numel()].copy_(adapter.payload, non_blocking=True)
                self._load_payload(slot, adapter.rank)
            self.slot_ranks[slot : slot + 1].fill_(self._ranks[slot])
            return
        self.slot_ranks[slot] = self._ranks[slot]
        for spec, (a, b) in zip(self.specs, self.linears, strict=True):
            first = slot * len(spec.parts) * self.max_rank
            for tensor in (a, b):
                tensor[first : first + len(spec.parts) * self.max_rank].zero_()
            if adapter is not None:
                self._load_linear(spec, a, b, first, adapter)

    def clear_slot(self, slot: int) -> None:
        """Empty `slot`: rows that use it get nothing from it."""
        self.load_slot(slot, None)

    @property
    def can_pretend(self) -> bool:
        """Whether `pretend` may be called: all slots are empty, and ranks alone say what a step takes."""
        return self.grouped and not any(self._ranks)

    def pretend(self, slots: int, rank: int) -> None:
        """For trials: the first `slots` slots count as adapters of `rank`, whose factors may be anything finite; with
        rank 0 they are empty again."""
        assert 0 <= slots <= self.num_slots and 0 <= rank <= self.max_rank
        self._ranks[:slots] = [rank] * slots
        self.slot_ranks[:slots].fill_(rank)
        self._forget_batches()

    def _load_linear(self, spec: LinearSpec, a: Tensor, b: Tensor, row: int, adapter: HostAdapter) -> None:
        column = 0
        for key, (_, width) in zip(spec.keys, spec.parts, strict=True):
            if key in adapter.factors:
                a_part, b_part = adapter.factors[key]
                rank = a_part.shape[0]
                a[row : row + rank].copy_(a_part, non_blocking=True)
                # B travels as it lies in the blob and is transposed on the device.
                b[row : row + rank, column : column + width].copy_(b_part.to(b.device, non_blocking=True).t())
            row += self.max_rank
            column += width

    def _load_payload(self, slot: int, rank: int) -> None:
        """From the staging memory to the slot."""
        places, blob = unpack(self._staging, len(self._layout), self._store.dtype)
        load_slot(self._store, blob, places, self._layout, slot, round_up(rank, RANK_BLOCK), self._align)

    def work(self, row_adapters: RowAdapters, query_lens: Sequence[int], num_tokens: int | None = None) -> AdapterWork:
        """How much the adapters of these rows are, counted in blocks of ranks of distinct slots: of few tokens, all of
        them; of more, those of short rows, whose tokens share tiles. `num_tokens`: of the step's kernels, where padding
        makes them more than the rows'. A draft's slot is empty where the adapter has no companion."""
        blocks = self._blocks(row_adapters)
        if not blocks:
            return AdapterWork.NONE
        if (num_tokens or sum(query_lens)) <= MOST_FOLDED:
            return AdapterWork.MANY if blocks > MANY_BLOCKS else AdapterWork.SOME
        short = [adapters for adapters, count in zip(row_adapters, query_lens, strict=True) if count < LARGEST_TILE]
        return AdapterWork.MANY if self._blocks(short) > FEW_BLOCKS else AdapterWork.SOME

    def _blocks(self, row_adapters: RowAdapters) -> int:
        slots = {slot for adapters in row_adapters for slot, _ in adapters}
        return sum(cdiv(self._ranks[slot], RANK_BLOCK) for slot in slots)

    def device_batch(
        self, token_rows: Tensor, row_slots: Tensor, row_weights: Tensor, work: AdapterWork = AdapterWork.SOME,
        max_query_len: int | None = None,
    ) -> GroupedLora:  # fmt: skip
        """What the linears need to apply adapters to T = len(token_rows) tokens, all of it read on the device.

        `token_rows` [T] int64: each token's row; `row_slots` [R, M] int64 (negative: none) and `row_weights` [R, M]
        float32: the row's adapters, a slot named twice counts with the sum. Part of a forward: made inside its graph,
        so that a replay sees the rows and slots of its own time. `work` is what to expect of them: right for any, fast
        for this. No row has more tokens than `max_query_len` (None: any number). Where `grouped` is False, see
        `make_batch`.
        """
        assert self.grouped, "slots lie as make_batch reads them"
        return grouped_lora(
            self._slot_factors, self._rank_stride, self.slot_ranks, token_rows, row_slots, row_weights,
            many=work is AdapterWork.MANY, behind=self.behind, max_query_len=max_query_len,
        )  # fmt: skip

    def make_batch(self, row_adapters: RowAdapters, query_lens: Sequence[int]) -> LoraBatch | None:
        """What the linears need to apply adapters to T = sum(query_lens) tokens, or None if no row has any.

        `row_adapters[i]` are the (slot, weight) pairs of row i, whose `query_lens[i]` tokens lie together; a slot named
        twice in a row counts with the sum. Decode steps repeat, so the last few batches are kept until a slot changes.
        """
        assert not self.grouped, "slots lie as device_batch reads them"
        assert len(row_adapters) == len(query_lens)
        slots = {slot for row in row_adapters for slot, _ in row}
        active = tuple(sorted(slot for slot in slots if self._ranks[slot]))
        if not active:
            return None
        if active != self._active:
            self._activate(active)
        key = (tuple(row_adapters), tuple(query_lens))
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) == _MAX_BATCHES:
                del self._batches[next(iter(self._batches))]
            batch = self._batches[key] = self._make_batch(row_adapters, query_lens)
        return batch

    def _activate(self, active: tuple[int, ...]) -> None:
        """Rank rows of the active slots, one index tensor for each number of parts."""
        self._forget_batches()
        self._active = active
        # On the CPU a step is bound by operators; on a device the copy would eat into the KV cache's memory.
        self._factors = [None] * len(self.specs) if self._device.type == "cpu" else None
        for parts in sorted(set(self._parts)):
            rows = [
                (slot * parts + part) * self.max_rank + row
                for slot in active
                for part in range(parts)
                for row in range(self._ranks[slot])
            ]
            self._rows[parts] = torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _make_batch(self, row_adapters: RowAdapters, query_lens: Sequence[int]) -> LoraBatch:
        column = {slot: index for index, slot in enumerate(self._active)}
        table = [[0.0] * len(column) for _ in row_adapters]
        for row, adapters in zip(table, row_adapters, strict=True):
            for slot, weight in adapters:
                if slot in column:
                    row[column[slot]] += weight
        by_row = torch.tensor(table, dtype=self._weight_dtype)  # [rows, active slots]
        by_token = by_row.repeat_interleave(torch.tensor(query_lens), dim=0)  # [T, active slots]
        ranks = torch.tensor([self._ranks[slot] for slot in self._active])
        weights = {
            parts: by_token.repeat_interleave(ranks * parts, dim=1).to(self._device)  # [T, active rank rows]
            for parts in self._rows
        }
        return LoraBatch(self.linears, self._parts, self._rows, weights, self._factors)

    def _forget_batches(self) -> None:
        """Batches already handed out keep what they were made of: fresh containers, not cleared ones."""
        self._active, self._rows, self._factors, self._batches = (), {}, None, {}


def _allocate(
    rooms: Sequence[Tensor | None], a_shapes: Sequence[_Shape], b_shapes: Sequence[_Shape], dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """Zeros for each linear's a and b, a in the room that it has. A slot is loaded by one kernel, which knows places by
    their offsets from the beginning of one tensor: that is the first of the result."""
    sizes: list[int] = []
    for room, a_shape, b_shape in zip(rooms, a_shapes, b_shapes, strict=True):
        sizes += [math.prod(a_shape) if room is None else 0, math.prod(b_shape)]
    store = torch.zeros(sum(sizes), dtype=dtype, device=device)
    flat = torch.split_with_sizes(store, sizes)
    return store, [
        (a.view(a_shape) if room is None else room.zero_(), b.view(b_shape))
        for room, a, b, a_shape, b_shape in zip(rooms, flat[::2], flat[1::2], a_shapes, b_shapes, strict=True)
    ]
