"""Before requests come every kernel of large steps was launched; what it takes is written down here."""

from __future__ import annotations

import pytest
import torch

from specserve.runtime.ragged_graphs import MAX_TOKENS
from specserve.runtime.warm_up import sequence_lens, step_sizes
from specserve_kernels.lora.shrink import shrink_cut


@pytest.mark.parametrize("max_tokens", [2048, 8192, 16384])
@pytest.mark.parametrize(("parts", "blocks", "rank_stride"), [(1, 8, 16), (3, 64, 64), (2, 370, 16)])
def test_no_other_number_of_tokens_needs_another_kernel(
    max_tokens: int, parts: int, blocks: int, rank_stride: int
) -> None:
    def constants(tokens: int) -> dict[str, object]:
        return dict(shrink_cut(tokens, 4096, parts, 4, blocks, rank_stride, torch.bfloat16, True).constants)

    warm = [constants(tokens) for tokens in step_sizes(max_tokens)]
    assert all(constants(tokens) in warm for tokens in range(MAX_TOKENS + 1, max_tokens + 1, 16))


def test_steps_that_graphs_cover_are_left_out() -> None:
    assert list(step_sizes(MAX_TOKENS)) == []
    assert list(step_sizes(MAX_TOKENS + 1)) == [MAX_TOKENS + 1]
    assert list(step_sizes(4000)) == [1088, 2176, 4000]


@pytest.mark.parametrize(("tokens", "max_context"), [(1088, 512), (1088, 4096), (8192, 2048), (40, 8)])
def test_sequences_are_as_long_as_they_may_be(tokens: int, max_context: int) -> None:
    lens = sequence_lens(tokens, max_context)
    assert sum(lens) == tokens and max(lens) <= max_context and min(lens) == 1 and lens[-1] > 1
