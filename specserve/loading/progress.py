"""What a start shows of its progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LOG_SECONDS = 5.0  # between two reports where stderr is no terminal but a log


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A line on stderr that counts bytes up to `total`; gives the function that takes what was done since."""
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, mininterval=seconds, disable=not shown) as bar:
        yield bar.update
