"""The search for a thread count, on forwards whose cost is a known function of it."""

from __future__ import annotations

import pytest
import torch

from specserve.runtime.threads import fastest_thread_count


@pytest.mark.parametrize(
    ("milliseconds", "most", "best"),
    [
        ({1: 8, 2: 4, 4: 2}, 4, 4),  # a large model scales
        ({1: 8, 2: 4, 3: 2}, 3, 3),
        ({1: 2, 2: 2, 4: 2}, 4, 1),  # a small one does not
        ({1: 2, 2: 20, 4: 20}, 4, 1),  # nor does anything on a busy machine
        ({1: 8, 2: 3, 4: 9}, 4, 2),
        ({1: 2}, 1, 1),
    ],
)
def test_the_cheapest_worthwhile_count_is_found(milliseconds: dict[int, int], most: int, best: int) -> None:
    before = torch.get_num_threads()
    now = [0]

    def forward() -> None:
        now[0] += milliseconds[torch.get_num_threads()]

    found = fastest_thread_count(forward, most, lambda: float(now[0]))
    assert found == best
    assert torch.get_num_threads() == before
