"""Reads of adapter folders: what one read gives, and the threads on which they happen."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from specserve.core.errors import AdapterError
from specserve_adapters.adapter_files import check_folder, version_of
from specserve_adapters.entry import AdapterSource
from specserve_adapters.host_memory import HostMemory
from specserve_adapters.peft_reader import ReadAdapter, read_adapter
from specserve_adapters.spec import LinearSpec
from specserve_adapters.store import StoredAdapter

READERS = 2
_Job = TypeVar("_Job")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """What the adapters of this engine must fit, where they go and who reads. Without a draft model (`draft_specs`
    None) companions are not read."""

    target_specs: Sequence[LinearSpec]
    draft_specs: Sequence[LinearSpec] | None
    max_rank: int
    max_bytes: int  # of one adapter in host memory
    dtype: torch.dtype
    draft_dtype: torch.dtype
    memory: HostMemory
    helpers: ThreadPoolExecutor


def check_source(source: AdapterSource, settings: ReadSettings) -> None:
    """By stat only. Raises AdapterError naming the adapter where a folder or one of its files is missing."""
    try:
        check_folder(source.path)
        companion = source.companion()
    except (AdapterError, OSError) as error:
        raise AdapterError(f"Adapter {source.name!r}: {error}", param="path") from error
    if companion is not None and settings.draft_specs is not None:
        with _telling_of_companion(source, companion):
            check_folder(companion)


def read_source(source: AdapterSource, settings: ReadSettings) -> StoredAdapter:
    """Read, hash and validate target and companion. The version describes the very bytes that were parsed.

    Raises AdapterError naming the adapter, and whatever is wrong with it.
    """
    try:
        target = _read(source.path, settings.target_specs, settings.dtype, settings)
        companion = source.companion() if settings.draft_specs is not None else None
    except (AdapterError, OSError, MemoryError) as error:
        raise AdapterError(f"Adapter {source.name!r}: {_reason(error)}", param="path") from error
    if companion is None or settings.draft_specs is None:
        return StoredAdapter(version_of(target.contents, None), target.adapter, None)
    with _telling_of_companion(source, companion):
        draft = _read(companion, settings.draft_specs, settings.draft_dtype, settings)
    return StoredAdapter(version_of(target.contents, draft.contents), target.adapter, draft.adapter)


@contextmanager
def _telling_of_companion(source: AdapterSource, companion: Path) -> Iterator[None]:
    """An adapter is never served without the companion that it has: what is wrong with one is said, and what to do."""
    try:
        yield
    except (AdapterError, OSError, MemoryError) as error:
        if source.draft_path is not None:
            param, instead = "draft_path", "name another draft_path, or none: then the subfolder draft/ is meant."
        else:
            param, instead = "path", f"move {companion} away: without one, the draft model drafts as it is."
        raise AdapterError(
            f"Adapter {source.name!r}: draft companion: {_reason(error)} Make another with `specserve adapters distill "
            f"{source.name}`, or {instead}",
            param=param,
        ) from error


def _reason(error: Exception) -> str:
    return "there is not enough memory to read it." if isinstance(error, MemoryError) else str(error)


def _read(path: Path, specs: Sequence[LinearSpec], dtype: torch.dtype, settings: ReadSettings) -> ReadAdapter:
    return read_adapter(
        path, specs, max_rank=settings.max_rank, dtype=dtype, memory=settings.memory, helpers=settings.helpers,
        # A float64 file may become a 16-bit adapter, a quarter of its size; anything larger cannot fit in any case.
        max_file_bytes=4 * settings.max_bytes + (1 << 20), max_bytes=settings.max_bytes,
    )  # fmt: skip


class ReadQueue(Generic[_Job]):
    """Jobs begun in order, a few at once, so that none waits for one slow disk or one large adapter alone. A finished
    one keeps its place until it is popped: at most `READERS` adapters are in memory that the host tier does not hold.

    `wanted` is asked, by the owner's thread, before a job begins; one that nobody wants any more is dropped. Jobs of
    the same `name` are told of in the order of their submission, so that of two reloads the later one decides.
    """

    def __init__(
        self,
        read: Callable[[_Job], StoredAdapter],
        wanted: Callable[[_Job], bool] = lambda job: True,
        name: Callable[[_Job], object] = lambda job: job,
    ) -> None:
        self._read = read
        self._wanted = wanted
        self._name = name
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-reader")
        self._waiting: deque[_Job] = deque()
        self._begun: dict[_Job, Future[StoredAdapter]] = {}
        self.reads = 0  # that ended, well or badly, and the seconds that they took
        self.seconds = 0.0
        self._counting = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._begun)

    def submit(self, job: _Job) -> None:
        """Read it after those before it."""
        self._waiting.append(job)
        self._begin()

    def finished(self) -> list[tuple[_Job, StoredAdapter | AdapterError]]:
        """The jobs that are finished and what their reads gave, in the order of their submission. Never blocks."""
        finished: list[tuple[_Job, StoredAdapter | AdapterError]] = []
        under_way: set[object] = set()
        for job, future in self._begun.items():
            if self._name(job) in under_way or not future.done():
                under_way.add(self._name(job))
            else:
                finished.append((job, _result(future)))
        return finished

    def pop(self, job: _Job) -> None:
        """Done with a finished job: another may begin."""
        del self._begun[job]
        self._begin()

    def wait(self, timeout: float) -> bool:
        """Block until the reads under way end, at most `timeout` seconds. False at once if there are none."""
        under_way = [future for future in self._begun.values() if not future.done()]
        wait(under_way, timeout)
        return bool(under_way)

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """End the threads after the reads under way, and then do `then`, perhaps more than once."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        begun = list(self._begun.values())

        def ended(_: Future[StoredAdapter]) -> None:
            if all(future.done() for future in begun):
                then()

        for future in begun:
            future.add_done_callback(ended)
        if not begun:
            then()

    def _begin(self) -> None:
        while self._waiting and len(self._begun) < READERS:
            job = self._waiting.popleft()
            if self._wanted(job):
                self._begun[job] = self._threads.submit(self._run, job)

    def _run(self, job: _Job) -> StoredAdapter:
        began = time.perf_counter()
        try:
            return self._read(job)
        except AdapterError:
            raise
        except Exception as error:  # a file nobody foresaw fails its own load, not the engine
            _log.exception("Reading an adapter failed unexpectedly")
            raise AdapterError(f"The adapter cannot be read: {type(error).__name__}: {error}.", param="path") from error
        finally:
            with self._counting:
                self.reads += 1
                self.seconds += time.perf_counter() - began


def _result(future: Future[StoredAdapter]) -> StoredAdapter | AdapterError:
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, AdapterError):
        raise error
    return error
