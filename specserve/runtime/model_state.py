"""ModelState: one model (target or draft) with its KV cache and its pool of adapter slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specserve.layers.context import ForwardContext, LoraApplier
from specserve.layers.linear import Linear
from specserve.models.spec import ModelSpec
from specserve.runtime.layout import StepLayout
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterPool, AdapterWork
from specserve_kernels.attention.backends import takes_ragged
from specserve_kernels.attention.paged import AttentionMetadata, AttentionShape
from specserve_kernels.inputs import RowTables, gather_inputs


class Model(Protocol):
    """What a family's file provides."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def linears(self) -> Sequence[Linear]: ...

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor: ...
    def compute_logits(self, hidden: Tensor) -> Tensor: ...


def kv_bytes_per_block(spec: ModelSpec, block_size: int) -> int:
    """Bytes of one block's keys and values over all layers."""
    return 2 * spec.num_layers * block_size * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize


class ModelState:
    """`kv_caches[layer]` = (k, v), each [num_blocks * block_size, kv_heads, head_dim], once `allocate` was called."""

    def __init__(
        self, model: Model, *, block_size: int, adapter_slots: int, max_rank: int, device: torch.device
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.kv_caches: list[tuple[Tensor, Tensor]] = []
        specs = [linear.spec for linear in model.linears]
        behind = [linear.storage.behind for linear in model.linears]
        self.adapters = AdapterPool(specs, adapter_slots, max_rank, model.spec.dtype, device, behind)
        self._device = device

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache, of finite numbers; one that was there before is given up."""
        spec = self.model.spec
        shape = (num_blocks * self.block_size, spec.num_kv_heads, spec.head_dim)
        self.kv_caches = []

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=spec.dtype, device=self._device)

        self.kv_caches = [(zeros(), zeros()) for _ in range(spec.num_layers)]

    def forward(
        self,
        rows: DeviceRows,
        layout: StepLayout,
        positions: Tensor | None,
        context_bounds: tuple[int, ...],
        *,
        work: AdapterWork | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] of the rows' history at `positions` [T] (None: the layout's); their KV is written
        on the way.

        Positions that were never given a block (over-long rows) write to block 0. `work`: what to expect
        of the rows' adapters; None: what the host knows of them.
        """
        tables = RowTables(rows.num_tokens, rows.history, rows.block_tables)
        last_position = self.model.spec.max_model_len - 1
        positions = layout.positions if positions is None else positions
        inputs = gather_inputs(layout.token_rows, positions, tables, self.block_size, last_position)
        metadata = AttentionMetadata(
            positions=inputs.positions,
            slot_mapping=inputs.slots,
            block_tables=rows.block_tables,
            rows=layout.row_index,
            query_start=layout.query_start,
            query_lens=layout.query_lens,
            context_bounds=context_bounds,
            block_size=self.block_size,
            max_query_len=layout.max_query_len,
        )
        lora = self._lora(rows, layout, self.adapter_work(rows, layout) if work is None else work)
        return self.model.forward(inputs.input_ids, ForwardContext(metadata, self.kv_caches, lora))

    @property
    def takes_ragged(self) -> bool:
        """Whether `forward` takes layouts whose lengths only the device knows."""
        spec = self.model.spec
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype)
        return takes_ragged(shape, self.block_size, self._device)

    def adapter_work(self, rows: DeviceRows, layout: StepLayout, num_tokens: int | None = None) -> AdapterWork:
        """How much the adapters of the step's rows are, by what the host knows. `num_tokens`: with padding."""
        assert layout.query_lens is not None, "ragged layouts are for devices alone"
        return self.adapters.work([rows.adapters[row] for row in layout.rows], layout.query_lens, num_tokens)

    @property
    def adapters_behind(self) -> bool:
        """Whether prompts with decodes among them have kernels of their own for adapters: see AdapterPool.work."""
        return self.adapters.behind

    def _lora(self, rows: DeviceRows, layout: StepLayout, work: AdapterWork) -> LoraApplier | None:
        if work is AdapterWork.NONE:
            return None
        if self.adapters.grouped:
            longest = max(layout.query_lens) if layout.query_lens else layout.max_query_len
            return self.adapters.device_batch(
                layout.token_rows, rows.adapter_slots, rows.adapter_weights, work, longest
            )
        assert layout.query_lens is not None, "ragged layouts are for devices with grouped adapters"
        return self.adapters.make_batch([rows.adapters[row] for row in layout.rows], layout.query_lens)
