"""Short kernels beside a long one: a second branch of a captured graph, whose launches cost the host nothing.

Work on a side stream sees what the current stream was given before, and `join` makes the current stream wait for it.
Kernels at either end depend on two others and so cannot start early (see overlap).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Side:
    """A stream beside the current one of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Launches inside go to the side, behind what the current stream has."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream waits for the side."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def is_captured() -> bool:
    """Whether launches go into a graph now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
