"""The servers of a comparison: all resident at once, or, where they do not fit, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from specserve.bench.servers import RunningServer, ServerFailedError, start_server, stop_servers
from specserve.bench.variants import Variant

MEMORY_SHARE = 0.9  # of a device, for all of its servers together


class Fleet:
    """Starts servers and knows which run; `async with` stops them on every way out.

    `told` gets a line for a person whenever something takes a while.
    """

    def __init__(
        self, variants: Sequence[Variant], logs: Path, *, start_timeout: float, told: Callable[[str], None]
    ) -> None:
        self.variants = {variant.name: variant for variant in variants}
        self.starts = 0
        self._logs, self._timeout, self._told = logs, start_timeout, told
        self._started: list[RunningServer] = []  # every process that is not stopped yet, ready or not
        self._ready: dict[str, RunningServer] = {}

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop_all()

    async def start_together(self) -> ServerFailedError | None:
        """Start all of them, each with its part of the memory. Where one after the first lacks memory, stop them again
        and return its failure; raises ServerFailedError for any other."""
        ours = [variant for variant in self.variants.values() if variant.url is None]
        share = round(MEMORY_SHARE / max(len(ours), 1), 4)
        for variant in self.variants.values():
            taken = share * ours.index(variant) if variant in ours else 0.0
            try:
                await self._start(variant, share, taken)
            except ServerFailedError as failure:
                if not (failure.lacks_memory and taken):
                    raise
                await self._stop_all()
                return failure
        return None

    async def alone(self, name: str) -> RunningServer:
        """The variant's server with all of the memory to itself: whoever else runs is stopped first."""
        if name not in self._ready:
            await self._stop_all()
            await self._start(self.variants[name], MEMORY_SHARE, 0.0)
        return self._ready[name]

    def running(self, name: str) -> RunningServer:
        """One of those that were started together."""
        return self._ready[name]

    async def _start(self, variant: Variant, share: float, taken: float) -> None:
        if variant.url is None:
            self.starts += 1
            self._told(f"Starting {variant.name} ({variant.title})")
        log = self._logs / f"{variant.name}-{self.starts}.log"
        self._ready[variant.name] = await start_server(
            variant, log, share=share, taken=taken, timeout=self._timeout, started=self._started
        )

    async def _stop_all(self) -> None:
        try:
            await stop_servers(self._started)
        finally:
            self._started.clear()
            self._ready.clear()
