"""StepInputs: a plan as index tensors on the device, all moved there by one copy together with the plan's changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specserve.core.plan import PlanRow, StepPlan
from specserve.runtime.layout import PackedLayout, StepLayout, pack_layout, sample_index
from specserve.runtime.packing import Packer
from specserve.runtime.rows import DeviceRows

MAX_KEPT = 32


@dataclass(frozen=True, slots=True, eq=False)
class DraftGroup:
    """The G rows that one proposer drafts for. `places`: among the sampling rows, on the host; `indices` [G] int64: the
    same on the device; `row_index` [G] int64: device rows; `limits` [G] int64: drafts of each, as `num_drafts`."""

    proposer: str
    places: tuple[int, ...]
    rows: tuple[int, ...]
    num_drafts: tuple[int, ...]
    indices: Tensor
    row_index: Tensor
    limits: Tensor


class _PackedGroup(NamedTuple):
    """A DraftGroup whose tensors are handles into a step's buffer."""

    proposer: str
    places: tuple[int, ...]
    rows: tuple[int, ...]
    num_drafts: tuple[int, ...]
    handles: tuple[slice, slice, slice]

    def on_device(self, packed: Packer) -> DraftGroup:
        return DraftGroup(*self[:4], *(packed[handle] for handle in self.handles))


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What one step reads besides the device rows. `sample_index` [S * (K+1)] tokens whose logits are wanted (None:
    all); `sampling_rows` [S] device rows; `draft_limits` [S]: how many drafts of a proposer with KV each sampling row
    gets (None: no row gets any)."""

    layout: StepLayout
    sample_index: Tensor | None
    sampling_rows: Tensor
    catch_up: StepLayout | None
    draft_groups: tuple[DraftGroup, ...]
    draft_limits: Tensor | None


class StepPacker:
    """Turns plans into StepInputs and applies their changes. Steady decoding repeats a step's shape many times, so
    the inputs of such steps are kept, and a step that changes nothing sends nothing."""

    def __init__(self, rows: DeviceRows, keeps_kv: dict[str, bool], device: torch.device) -> None:
        self._rows = rows
        self._keeps_kv = keeps_kv
        self._device = device
        self._kept: dict[tuple[object, ...], StepInputs] = {}

    def prepare(self, plan: StepPlan) -> StepInputs | None:
        """Bring the plan's changes and inputs to the device in one copy; None for a plan without rows."""
        packer = Packer()
        changes = self._rows.pack(plan.new_rows, plan.blocks, packer)
        key = _key(plan.rows)
        inputs = self._kept.get(key) if key is not None else None
        making = None if inputs is not None or not plan.rows else _Making(plan.rows, self._keeps_kv, packer)
        packer.upload(self._device)
        if changes is not None:
            self._rows.apply(changes, packer)
        if making is None:
            return inputs
        inputs = making.inputs(packer)
        if key is not None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = inputs
        return inputs


def _key(plan_rows: Sequence[PlanRow]) -> tuple[object, ...] | None:
    """What a step's inputs depend on, if all of its rows decode or verify and may do the same in the next step."""
    if not plan_rows or any(row.start is not None or row.draft_prefill for row in plan_rows):
        return None
    return tuple((row.row, row.num_drafts, row.proposer) for row in plan_rows)


class _Making:
    """The arrays of a plan's rows, put into the step's buffer before it is sent and taken from it after."""

    def __init__(self, plan_rows: Sequence[PlanRow], keeps_kv: dict[str, bool], packer: Packer) -> None:
        self._sampling = [row for row in plan_rows if row.samples]
        lens = [row.num_new + row.num_drafts for row in plan_rows]
        starts = [row.start for row in plan_rows]
        self._layout = pack_layout([row.row for row in plan_rows], lens, packer, starts)
        wanted = sample_index(plan_rows)
        self._sample_index = None if wanted is None else packer.add(wanted)
        self._sampling_rows = packer.add([row.row for row in self._sampling])
        self._catch_up = _pack_catch_up(plan_rows, packer)
        self._groups = [self._pack_group(name, packer) for name in _proposers(self._sampling)]
        limits = [row.num_drafts if keeps_kv.get(row.proposer or "") else 0 for row in self._sampling]
        self._limits = packer.add(limits) if any(limits) else None

    def _pack_group(self, name: str, packer: Packer) -> _PackedGroup:
        places = [i for i, row in enumerate(self._sampling) if row.num_drafts and (row.proposer or "") == name]
        rows = tuple(self._sampling[i].row for i in places)
        num_drafts = tuple(self._sampling[i].num_drafts for i in places)
        handles = (packer.add(places), packer.add(rows), packer.add(num_drafts))
        return _PackedGroup(name, tuple(places), rows, num_drafts, handles)

    def inputs(self, packed: Packer) -> StepInputs:
        return StepInputs(
            layout=self._layout.on_device(packed),
            sample_index=None if self._sample_index is None else packed[self._sample_index],
            sampling_rows=packed[self._sampling_rows],
            catch_up=None if self._catch_up is None else self._catch_up.on_device(packed),
            draft_groups=tuple(group.on_device(packed) for group in self._groups),
            draft_limits=None if self._limits is None else packed[self._limits],
        )


def _proposers(plan_rows: Sequence[PlanRow]) -> list[str]:
    return sorted({row.proposer or "" for row in plan_rows if row.num_drafts})


def _pack_catch_up(plan_rows: Sequence[PlanRow], packer: Packer) -> PackedLayout | None:
    behind = [row for row in plan_rows if row.draft_prefill]
    if not behind:
        return None
    return pack_layout([row.row for row in behind], [row.draft_prefill for row in behind], packer)
