"""Keep an engine running: notice its death at once, start another, give it back the adapters that it had."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable

import msgspec

from specserve.config import EngineConfig
from specserve.core.errors import EngineDeadError, SpecserveError
from specserve.core.messages import (
    AdapterInfo,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Ready,
    Reply,
    StepOutputs,
    ToEngine,
    UnloadAdapter,
)
from specserve.engine.client.launch import EngineLink, launch

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 0.1  # seconds before the first restart; doubles with each failure in a row
MAX_BACKOFF = 30.0  # seconds

AdapterCall = LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters


class AdapterBook:
    """The adapters that an engine was told to hold, as the calls that would tell it again."""

    def __init__(self, loras: tuple[tuple[str, str], ...]) -> None:
        self._loads = {name: LoadAdapter(call_id=0, name=name, path=path) for name, path in loras}

    def __contains__(self, name: object) -> bool:
        return name in self._loads

    @property
    def names(self) -> list[str]:
        return list(self._loads)

    def load(self, name: str) -> LoadAdapter:
        """The call that would load it again; KeyError for an unknown name."""
        return self._loads[name]

    def record(self, call: AdapterCall) -> None:
        """Note a call that the engine has carried out."""
        if isinstance(call, LoadAdapter):
            self._loads[call.name] = msgspec.structs.replace(call, replace=False, read=True)
        elif isinstance(call, UnloadAdapter):
            self._loads.pop(call.name, None)
        elif isinstance(call, PinAdapter) and call.name in self._loads:
            self._loads[call.name] = msgspec.structs.replace(self._loads[call.name], pinned=call.pinned)

    def forget(self, name: str) -> None:
        self._loads.pop(name, None)

    @property
    def loads(self) -> list[LoadAdapter]:
        return list(self._loads.values())


class Supervisor:
    """Owns the engine process. `on_outputs` gets each step's outputs, those of several where they wait; `on_death` is
    called once a death.

    `alive` is false from the death until the next engine is ready, with its adapters.
    """

    def __init__(
        self,
        config: EngineConfig,
        core: str,
        on_outputs: Callable[[list[StepOutputs]], None],
        on_death: Callable[[], None],
    ) -> None:
        self.adapters = AdapterBook(config.loras)
        self.restarts = 0
        self._config = config
        self._core = core
        self._on_outputs = on_outputs
        self._on_death = on_death
        self._link: EngineLink | None = None
        self._calls: dict[int, tuple[AdapterCall, asyncio.Future[Reply]]] = {}
        self._call_ids = itertools.count(1)
        self._alive = asyncio.Event()
        self._pause = FIRST_BACKOFF
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        """Launch the first engine; raises what it failed with."""
        self._link = await launch(self._config, self._core)
        self._alive.set()
        self._task = asyncio.create_task(self._run(self._link), name="specserve-engine-supervisor")
        return self._link.ready

    @property
    def alive(self) -> bool:
        return self._alive.is_set()

    @property
    def pid(self) -> int | None:
        """Of the engine's process, while one is alive."""
        return self._link.process.pid if self.alive and self._link is not None else None

    async def wait_alive(self) -> None:
        """Until an engine can serve."""
        await self._alive.wait()

    def send(self, message: ToEngine) -> None:
        """To the engine; raises EngineDeadError while there is none."""
        self._living_link().send(message)

    async def call(self, call: AdapterCall) -> list[AdapterInfo]:
        """An adapter operation and its answer; raises the engine's error, or EngineDeadError if it dies meanwhile."""
        return await self._call(self._living_link(), call)

    async def close(self) -> None:
        """End the engine and restart it no more."""
        self._alive.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_calls()
        if self._link is not None:
            await self._link.close()

    def _living_link(self) -> EngineLink:
        if self._link is None or not self.alive:
            raise EngineDeadError("The engine is being restarted; try again shortly.")
        return self._link

    async def _call(self, link: EngineLink, call: AdapterCall) -> list[AdapterInfo]:
        call = msgspec.structs.replace(call, call_id=next(self._call_ids))
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call.call_id] = call, future
        link.send(call)
        reply = await future
        if reply.error is not None:
            raise reply.error.to_error()
        return reply.adapters

    async def _run(self, link: EngineLink) -> None:
        started = time.monotonic()
        reader = asyncio.create_task(self._read(link))
        while True:
            try:
                await reader
            except Exception:
                # Ours to mend; but streams must end with an error event rather than hang, as after a death.
                logger.exception("What the engine said could not be taken in.")
            self._alive.clear()
            self._on_death()
            await link.close(timeout=1.0)
            logger.error("The engine process died with status %s; starting another.", link.process.returncode)
            if time.monotonic() - started > MAX_BACKOFF:
                self._pause = FIRST_BACKOFF
            link, reader = await self._restart()
            started = time.monotonic()

    async def _read(self, link: EngineLink) -> None:
        """Pass on what an engine says, until it dies."""
        try:
            async for messages in link.messages():
                if steps := [message for message in messages if isinstance(message, StepOutputs)]:
                    self._on_outputs(steps)
                for message in messages:
                    if isinstance(message, Reply):
                        self._answer(message)
        finally:
            self._fail_calls()

    def _answer(self, reply: Reply) -> None:
        call, future = self._calls.pop(reply.call_id)
        if reply.error is None:
            self.adapters.record(call)  # also where whoever asked has gone
        if not future.done():
            future.set_result(reply)

    def _fail_calls(self) -> None:
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError("The engine died before it answered; try again shortly."))
        self._calls.clear()

    async def _restart(self) -> tuple[EngineLink, asyncio.Task[None]]:
        """Launch until an engine stands, with a pause that doubles up to MAX_BACKOFF while they keep dying."""
        # The adapters come by LoadAdapter, one by one: a folder that has gone since must not keep the engine down.
        config = msgspec.structs.replace(self._config, loras=())
        while True:
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, MAX_BACKOFF)
            try:
                self._link = await launch(config, self._core)
            except (SpecserveError, OSError) as error:
                logger.error("The engine could not be restarted: %s", error)
                continue
            reader = asyncio.create_task(self._read(self._link))
            if await self._replay(self._link):
                self.restarts += 1
                self._alive.set()
                return self._link, reader
            await self._link.close(timeout=1.0)

    async def _replay(self, link: EngineLink) -> bool:
        """Tell it of the adapters that the last engine held; false if this one died over it.

        A look at each folder is enough: the first requests bring back those that are in use, while reading a thousand
        would take a minute in which nothing is served. Pinned ones are read.
        """
        for load in self.adapters.loads:
            try:
                await self._call(link, msgspec.structs.replace(load, read=load.pinned))
            except EngineDeadError:
                return False
            except SpecserveError as error:
                logger.error("Adapter %r could not be registered again: %s", load.name, error.message)
                self.adapters.forget(load.name)
        return True
