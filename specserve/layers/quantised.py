"""Weights in one byte each: quantised while they are loaded, multiplied as codes (specserve_kernels.skinny.quantised).

Activations, embeddings, norms, biases and adapters keep the model's dtype. Products of few bfloat16 rows take adapters
into themselves; else these are added beside the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specserve.layers.context import LoraApplier
from specserve.layers.storage import Parameter, whole
from specserve_kernels.activation import silu_mul
from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import GroupedLora
from specserve_kernels.skinny.ahead import Ahead
from specserve_kernels.skinny.codes import Coded, Kind, empty_coded
from specserve_kernels.skinny.linear import Norm, arrivals
from specserve_kernels.skinny.quantised import quantised_linear, takes_lora


class QuantisedStorage:
    """Codes [out, in] and a scale for each output, and an optional bias [out] in the model's dtype."""

    def __init__(
        self, kind: Kind, in_features: int, widths: Sequence[int], *, bias: bool, dtype: torch.dtype,
        device: torch.device, adapter_rows: int = 0,
    ) -> None:  # fmt: skip
        """`adapter_rows` as DenseStorage has them are none here: A is no codes."""
        self._widths = tuple(widths)
        self._coded = empty_coded(kind, sum(widths), in_features, device)
        self._bias = torch.empty(sum(widths), dtype=dtype, device=device) if bias else None
        self._arrivals = arrivals(device)

    def parameters(self) -> list[dict[str, Parameter]]:
        codes, scales = (values.split_with_sizes(self._widths) for values in self._coded)
        parts = [{"weight": _quantised(Coded(*part))} for part in zip(codes, scales, strict=True)]
        if self._bias is not None:
            for part, values in zip(parts, self._bias.split_with_sizes(self._widths), strict=True):
                part["bias"] = whole(values)
        return parts

    def matmul(self, x: Tensor, norm: Norm | None = None, *, gated: bool = False, lora: Folded | None = None) -> Tensor:
        if self._bias is None:
            return quantised_linear(x, self._coded, norm=norm, gated=gated, arrivals=self._arrivals, lora=lora)
        assert lora is None, "see fold"
        y = quantised_linear(x, self._coded, norm=norm, arrivals=self._arrivals).add_(self._bias)
        return silu_mul(y) if gated else y

    def add_matmul(self, y: Tensor, x: Tensor, *, lora: Folded | None = None, then: Norm | None = None) -> None:
        quantised_linear(x, self._coded, residual=y, arrivals=self._arrivals, lora=lora)
        if self._bias is not None:
            y.add_(self._bias)

    def takes_ahead(self, ahead: Ahead) -> bool:
        return False

    def matmul_ahead(self, ahead: Ahead, norm: Norm, *, gated: bool = False, lora: Folded | None = None) -> Tensor:
        raise NotImplementedError("codes have no such product: see takes_ahead")

    def fold(self, x: Tensor, lora: LoraApplier, linear_index: int) -> Folded | None:
        if self._bias is not None or not isinstance(lora, GroupedLora):
            return None
        fits = lora.foldable and takes_lora(x, self._coded, lora.linears[linear_index])
        return lora.fold(linear_index, x) if fits else None

    @property
    def behind(self) -> None:
        return None

    def matmul_behind(self, x: Tensor, lora: LoraApplier, linear_index: int) -> None:
        return None


class QuantisedHead:
    """The output head [vocab, hidden] as codes."""

    def __init__(self, kind: Kind, vocab_size: int, hidden_size: int, *, device: torch.device) -> None:
        self._coded = empty_coded(kind, vocab_size, hidden_size, device)
        self._arrivals = arrivals(device)

    def parameters(self) -> dict[str, Parameter]:
        return {"weight": _quantised(self._coded)}

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, vocab], in the dtype of `hidden`."""
        return quantised_linear(hidden, self._coded, arrivals=self._arrivals)


def _quantised(coded: Coded) -> Parameter:
    return Parameter(coded.codes, tuple(coded.codes.shape), coded.scales)
