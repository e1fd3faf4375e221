"""Forbidden token sequences: the kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.sampling.bad_words import ANY, forbid_words_ref, forbid_words_triton


@pytest.mark.parametrize("longest", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("num_drafts", "num_positions"), [(0, 1), (1, 2), (4, 5), (4, 1)])
def test_kernel_is_the_reference(device: torch.device, longest: int, num_drafts: int, num_positions: int) -> None:
    """Texts of two tokens, so that sequences of any length have begun; rows that have just begun, and one full."""
    generator = torch.Generator().manual_seed(longest)

    def draw(*shape: int, high: int = 2) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    num_rows, num_words, width, vocab = 6, 150, 24, 40
    words = draw(num_words, longest)
    words[:, -1] = draw(num_words, high=vocab - 1)
    beside = torch.arange(longest) < draw(num_words, high=longest)[:, None]
    words[beside] = ANY
    arguments = [
        torch.randn(num_rows, num_positions, vocab, generator=generator),
        draw(num_rows, 7)[:, :num_drafts],  # the first drafts of more
        words,
        draw(num_words, high=num_rows - 1).sort().values,  # the last row has none
        draw(num_rows + 1, width),
        torch.tensor([5, 0, 3, 1, 6, 2]),
        torch.tensor([1, 4, 9, 3, 0, 2]),
        torch.tensor([1, 5, 11, 20, width, 9]),
    ]
    arguments = [one.to(device) for one in arguments]
    logits = arguments[0].clone()
    found = forbid_words_triton(*arguments)
    assert torch.equal(found, forbid_words_ref(*arguments))
    assert torch.equal(arguments[0], logits)
    forbidden = found.isinf().sum((1, 2))
    assert (forbidden[:-1] > 0).all() and forbidden[-1] == 0
