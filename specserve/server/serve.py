"""Run a server: bind, start the engine, answer, drain on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable

from aiohttp import web

from specserve.config import EngineConfig
from specserve.engine.client.async_engine import AsyncEngine
from specserve.engine.client.launch import ENGINE_CORE
from specserve.server.app import make_app
from specserve.server.metrics import Metrics
from specserve.server.options import ServerConfig
from specserve.server.state import ServerState

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05


class PortInUseError(Exception):
    """The address cannot be listened on."""


async def serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    core: str = ENGINE_CORE,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal, then drain. `on_ready` gets the URL once requests are taken.

    Raises PortInUseError before anything is loaded, and what the engine's start fails with (ModelLoadError, say).
    """
    stop = _stop_on_signals()
    with bind(config.host, config.port) as sock:
        name = (config.served_model_name or (engine_config.model,))[0]
        metrics = Metrics(name)
        engine = AsyncEngine(engine_config, core=core, recorder=metrics)
        if not await _start_or_stop(engine, stop):
            return
        made = engine.ready
        logger.info(
            "The engine runs on %s in %s%s: a context of %d tokens, %d KV blocks of %d tokens; proposers: %s.",
            made.device, made.dtype, other_weights(made.facts()), made.max_model_len, made.num_blocks,
            engine_config.block_size, ", ".join(made.proposers),
        )  # fmt: skip
        metrics.watch(engine, engine_config.max_loras)
        state = ServerState(engine, config, metrics, config.served_model_name or (name,))
        runner = web.AppRunner(make_app(state), handler_cancellation=True, access_log=None)
        try:
            await runner.setup()
            await _listen(runner, sock)
            gc.freeze()  # else a collection now and then looks at all of the libraries' objects, and all streams wait
            on_ready(f"http://{config.host}:{sock.getsockname()[1]}")
            await stop.wait()
            await drain(state)
        finally:
            await engine.close()
            await runner.cleanup()


def other_weights(facts: dict[str, str]) -> str:
    """Those that are kept in something else than all the rest is."""
    kept = {"weights": facts["weights"], "the draft's": facts.get("draft_weights", facts["dtype"])}
    return "".join(f", {name} in {kind}" for name, kind in kept.items() if kind != facts["dtype"])


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet: a taken port shows before minutes go into loading a model."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise PortInUseError(f"Cannot listen on {host}:{port}: {error}") from error
    return sock


async def drain(state: ServerState) -> None:
    """Refuse new requests and wait for those in flight, at most `drain_timeout` seconds."""
    state.draining = True
    logger.info("Draining: %d requests in flight.", state.in_flight)
    deadline = asyncio.get_running_loop().time() + state.config.drain_timeout
    while state.in_flight and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    if state.in_flight:
        logger.warning("%d requests did not finish within the drain timeout and are cut off.", state.in_flight)


def _stop_on_signals() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT; the second ends the process at once."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)  # the engine sees its socket close and ends
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


async def _start_or_stop(engine: AsyncEngine, stop: asyncio.Event) -> bool:
    """Start the engine; false if a signal came first."""
    start = asyncio.create_task(engine.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if start.done():
        start.result()
        return True
    start.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await start
    return False


async def _listen(runner: web.AppRunner, sock: socket.socket) -> None:
    try:
        await web.SockSite(runner, sock, backlog=1024).start()
    except OSError as error:
        raise PortInUseError(f"Cannot listen on {sock.getsockname()}: {error}") from error
