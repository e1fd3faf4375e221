"""Reads of adapter folders: what one read gives, and the one thread on which they happen, in order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from specserve.core.errors import AdapterError
from specserve_adapters.adapter_files import AdapterFiles, check_folder, hash_files, read_files
from specserve_adapters.entry import AdapterSource
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.peft_reader import parse_adapter
from specserve_adapters.spec import LinearSpec
from specserve_adapters.store import StoredAdapter

_Job = TypeVar("_Job")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """What the adapters of this engine must fit. Without a draft model (`draft_specs` None) companions are not read."""

    target_specs: Sequence[LinearSpec]
    draft_specs: Sequence[LinearSpec] | None
    max_rank: int
    max_bytes: int  # of one adapter in host memory
    dtype: torch.dtype
    draft_dtype: torch.dtype
    pin_memory: bool


def check_source(source: AdapterSource, settings: ReadSettings) -> None:
    """By stat only. Raises AdapterError naming the adapter where a folder or one of its files is missing."""
    try:
        check_folder(source.path)
        companion = source.companion()
        if companion is not None and settings.draft_specs is not None:
            check_folder(companion)
    except (AdapterError, OSError) as error:
        raise AdapterError(f"Adapter {source.name!r}: {error}", param="path") from error


def read_source(source: AdapterSource, settings: ReadSettings) -> StoredAdapter:
    """Read, hash and validate target and companion. The version describes the very bytes that were parsed.

    Raises AdapterError naming the adapter, and whatever is wrong with it.
    """
    part = ""
    try:
        files = _read(source.path, settings)
        target = _parse(files, settings.target_specs, settings.dtype, settings)
        part = "draft companion: "
        companion = source.companion() if settings.draft_specs is not None else None
        if companion is None or settings.draft_specs is None:
            return StoredAdapter(hash_files(files, None), target, None)
        draft_files = _read(companion, settings)
        draft = _parse(draft_files, settings.draft_specs, settings.draft_dtype, settings)
        return StoredAdapter(hash_files(files, draft_files), target, draft)
    except (AdapterError, OSError, MemoryError) as error:
        reason = "there is not enough memory to read it." if isinstance(error, MemoryError) else str(error)
        raise AdapterError(f"Adapter {source.name!r}: {part}{reason}", param="path") from error


def _read(path: Path, settings: ReadSettings) -> AdapterFiles:
    # A float64 file may become a 16-bit adapter, a quarter of its size; anything larger cannot fit in any case.
    return read_files(path, max_weight_bytes=4 * settings.max_bytes + (1 << 20))


def _parse(files: AdapterFiles, specs: Sequence[LinearSpec], dtype: torch.dtype, settings: ReadSettings) -> HostAdapter:
    return parse_adapter(files, specs, max_rank=settings.max_rank, dtype=dtype, pin_memory=settings.pin_memory)


class ReadQueue(Generic[_Job]):
    """Jobs read one after the other on one thread. A finished one stays at the head until it is popped, and only then
    does the next begin: at most one adapter is in memory that the host tier does not hold yet."""

    def __init__(self, read: Callable[[_Job], StoredAdapter]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-reader")
        self._jobs: deque[_Job] = deque()
        self._head: Future[StoredAdapter] | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, job: _Job) -> None:
        """Read it after those before it."""
        self._jobs.append(job)
        if self._head is None:
            self._head = self._thread.submit(self._run, job)

    def finished(self) -> tuple[_Job, StoredAdapter | AdapterError] | None:
        """The job at the head and what its read gave, if it is finished. Never blocks."""
        if self._head is None or not self._head.done():
            return None
        error = self._head.exception()
        if error is None:
            return self._jobs[0], self._head.result()
        if not isinstance(error, AdapterError):
            raise error
        return self._jobs[0], error

    def pop(self) -> None:
        """Done with the head: begin the next."""
        self._jobs.popleft()
        self._head = self._thread.submit(self._run, self._jobs[0]) if self._jobs else None

    def wait(self, timeout: float) -> None:
        """Block until the head is finished, at most `timeout` seconds; at once if there is none."""
        if self._head is not None:
            wait([self._head], timeout)

    def close(self) -> None:
        """End the thread after the read under way."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: _Job) -> StoredAdapter:
        try:
            return self._read(job)
        except AdapterError:
            raise
        except Exception as error:  # a file nobody foresaw fails its own load, not the engine
            _log.exception("Reading an adapter failed unexpectedly")
            raise AdapterError(f"The adapter cannot be read: {type(error).__name__}: {error}.", param="path") from error
