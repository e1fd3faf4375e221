"""What a kernel is measured on: sizes, buffers, and one case of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.shapes import SHAPES, Shape

Made = TypeVar("Made")
Call = Callable[[], object]

COLD = 180e6
"""Bytes after which nothing of before is left in the L2 cache; three times the largest of today."""
MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """A model's shape and device, and how many tokens a step has."""

    shape: Shape
    device: torch.device
    rows: tuple[int, ...]  # requests that decode together
    contexts: tuple[int, ...]  # tokens of each of them
    prompt: int  # tokens of a step that prefills

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype).normal_(0.0, scale)


FULL = Setting(SHAPES["8b"], torch.device("cuda"), rows=(1, 32), contexts=(600, 4096), prompt=8192)
SMALL = Setting(SHAPES["tiny"], torch.device("cpu"), rows=(1, 3), contexts=(9, 33), prompt=320)


@dataclass(frozen=True, slots=True)
class Case:
    """The same work several times, on buffers of its own each time, and the least that it can take."""

    name: str
    calls: Sequence[Call]
    bytes: float  # of one call, that the memory must move at least
    error: Callable[[], float]  # of one call against the reference; see `relative` and `differing`
    flops: float = 0.0


Cases = Callable[[Setting], Iterator[Case]]


def copies(make: Callable[[], Made], size: float) -> list[Made]:
    """So many of them that a call of `size` bytes finds nothing of its own in the L2 cache.

    A case of less than COLD / MOST_COPIES bytes does find it there, as it would behind the kernel that wrote it.
    """
    return [make() for _ in range(min(max(math.ceil(COLD / size), 2), MOST_COPIES))]


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite where a result is not a number."""
    want = want.double()
    error = float((got.double() - want).abs_().amax() / want.abs().amax())
    return math.inf if math.isnan(error) else error


def differing(got: Tensor, want: Tensor) -> float:
    """The share of tokens that differ."""
    return float((got != want).double().mean())


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
