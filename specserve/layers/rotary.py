"""Rotary positions: the frequencies of each scaling, and a table of every position's cos and sin.

`parameters` is transformers' `rope_parameters` (5.x) or an older `rope_scaling` with `rope_theta` added. Formulas as in
transformers' modeling_rope_utils: linear; dynamic NTK, which up to max_position_embeddings is the unscaled one; llama3
(Llama 3.1); yarn (Peng et al. 2023). They are computed in fp32 whatever the model's dtype: that is what models were
trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specserve.core.errors import ModelLoadError
from specserve_kernels.gather import gather_rows

Frequencies = tuple[Tensor, float]
"""(inverse frequencies [head_dim / 2] fp32, factor on cos and sin)."""

_ROWS_AT_ONCE = 1 << 14  # while the tables are made: bounds what fp32 takes beside them


class Rotary:
    """Knows (cos, signed sin) of positions 0 … max_positions - 1, each [T, 1, head_dim] of `dtype`.

    The two tables are made once, so that a step is two copies of rows: 2 * max_positions * head_dim numbers, which is
    67 MB for 131072 positions of 128 in bf16 and 134 MB in fp32.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        head_dim: int,
        *,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        inverse, factor = frequencies(parameters, head_dim)
        # Frequencies of the first half negated: cos ignores the sign and sin takes it, as swapped halves need.
        signed = torch.cat((-inverse, inverse)).to(device)
        self._cos = torch.empty(max_positions, 1, head_dim, dtype=dtype, device=device)
        self._sin = torch.empty_like(self._cos)
        for first in range(0, max_positions, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, max_positions)
            angles = torch.arange(first, last, dtype=torch.float32, device=device).view(-1, 1, 1) * signed
            self._cos[first:last] = angles.cos() * factor
            self._sin[first:last] = angles.sin() * factor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and signed sin of positions [T] int64, all below max_positions."""
        return gather_rows(self._cos, positions), gather_rows(self._sin, positions)


def frequencies(parameters: Mapping[str, Any], head_dim: int) -> Frequencies:
    """Inverse frequencies of a rope scaling; ModelLoadError names one that is unsupported or incomplete."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scale = _SCALINGS.get(kind)
    if scale is None:
        raise ModelLoadError(f"Rope scaling {kind!r} is not supported; supported are {', '.join(sorted(_SCALINGS))}.")
    if parameters.get("partial_rotary_factor") not in {None, 1}:
        raise ModelLoadError("Rope with partial_rotary_factor other than 1 is not supported.")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    try:
        return scale(parameters, 1.0 / (float(parameters["rope_theta"]) ** exponents))
    except KeyError as error:
        raise ModelLoadError(f"Rope scaling {kind!r} needs {error.args[0]!r} in the model's config.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelLoadError(f"Rope scaling {kind!r} has a value that is not usable: {error}.") from None


def _default(_: Mapping[str, Any], inverse: Tensor) -> Frequencies:
    return inverse, 1.0


def _linear(parameters: Mapping[str, Any], inverse: Tensor) -> Frequencies:
    return inverse / parameters["factor"], 1.0


def _llama3(parameters: Mapping[str, Any], inverse: Tensor) -> Frequencies:
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * inverse / (2 * math.pi)
    # Fewer turns than `low` over the original context: divided; more than `high`: kept; between: blended.
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / factor + kept * inverse, 1.0


def _yarn(parameters: Mapping[str, Any], inverse: Tensor) -> Frequencies:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    dims, base = 2 * inverse.shape[0], float(parameters["rope_theta"])

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns so often over the original context."""
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low if high != low else 0.001
    divided = ((torch.arange(inverse.shape[0], dtype=torch.float32) - low) / width).clamp(0, 1)
    return inverse / factor * divided + inverse * (1 - divided), _yarn_attention(parameters)


def _yarn_attention(parameters: Mapping[str, Any]) -> float:
    """The factor on cos and sin, by which attention's temperature follows the context's extension."""
    given, factor = parameters.get("attention_factor"), float(parameters["factor"])
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)


_SCALINGS: Mapping[str, Callable[[Mapping[str, Any], Tensor], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,  # differs only beyond max_position_embeddings, where no request gets
    "llama3": _llama3,
    "yarn": _yarn,
}
