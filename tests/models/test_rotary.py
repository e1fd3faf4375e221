"""Rope frequencies against transformers' own, at sizes where every branch of a scaling has dimensions in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specserve.core.errors import ModelLoadError
from specserve.layers.rotary import Rotary, frequencies
from specserve.models.hf_config import rope_parameters
from specserve_kernels.tolerances import OP

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 16.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9},
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(list(scaling.values())))
def test_frequencies(scaling: dict[str, Any], head_dim: int) -> None:
    original = {} if scaling["rope_type"] in {"linear", "dynamic"} else {"original_max_position_embeddings": 4096}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=16384,
        rope_parameters={**scaling, **original, "rope_theta": 50000.0},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device=torch.device("cpu"))
    actual, actual_factor = frequencies(rope_parameters(config), head_dim)
    rtol, atol = OP[torch.float32]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * float(expected.min()))
    assert actual_factor == pytest.approx(factor, rel=1e-12)


def test_cos_and_signed_sin_are_of_true_positions_and_the_models_dtype() -> None:
    rotary = Rotary({"rope_theta": 100.0}, 4, max_positions=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    cos, sin = rotary.at(torch.tensor([0, 3]))
    angles = torch.tensor([[[0.0, 0.0]], [[3.0, 0.3]]])
    assert torch.equal(cos, torch.cat((angles.cos(), angles.cos()), -1).bfloat16())
    assert torch.equal(sin, torch.cat((-angles.sin(), angles.sin()), -1).bfloat16())


def test_unknown_scaling_is_named() -> None:
    with pytest.raises(ModelLoadError, match="su-scaled"):
        frequencies({"rope_type": "su-scaled", "rope_theta": 1e4}, 8)


def test_a_table_longer_than_what_is_made_at_once() -> None:
    device, last = torch.device("cpu"), 2**14 + 5
    rotary = Rotary({"rope_theta": 100.0}, 4, max_positions=last + 1, dtype=torch.float32, device=device)
    positions = torch.tensor([last, 2**14, 2**14 - 1, 7])
    cos, sin = rotary.at(positions)
    angles = positions.float().view(-1, 1, 1) * torch.tensor([1.0, 0.1])
    rtol, atol = OP[torch.float32]
    torch.testing.assert_close(cos, torch.cat((angles.cos(), angles.cos()), -1), rtol=rtol, atol=atol)
    torch.testing.assert_close(sin, torch.cat((-angles.sin(), angles.sin()), -1), rtol=rtol, atol=atol)
