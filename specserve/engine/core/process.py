"""The engine's own process: `python -m specserve.engine.core.process --fd N --core module:factory`.

The first frame is an EngineConfig, answered by Ready or Failed; then requests and calls come in and StepOutputs and
Replies go out. The process ends when its parent's end of the socket closes, so that no engine outlives its server.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from specserve.config import EngineConfig
from specserve.core.errors import SpecserveError
from specserve.core.messages import (
    AbortRequests,
    AddRequest,
    EngineStats,
    ErrorInfo,
    Failed,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Ready,
    Reply,
    RequestOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
    UnloadAdapter,
)
from specserve.engine.core.framing import Channel, PeerGoneError

logger = logging.getLogger(__name__)

STATS_INTERVAL = 0.1  # seconds

Call = LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters


class Core(Protocol):
    """What the loop drives: EngineCore."""

    ready: Ready

    def add_request(self, request: AddRequest) -> None: ...
    def abort_requests(self, ids: list[str]) -> None: ...
    def handle(self, call: Call) -> Reply | None: ...
    def poll_replies(self) -> list[Reply]: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[RequestOutput]: ...  # must not spin where all of its work waits for something
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class _Loop:
    """Messages in, one step, messages out; errors of one request end that request alone."""

    def __init__(self, channel: Channel, core: Core) -> None:
        self.channel = channel
        self.core = core
        self.refused: list[RequestOutput] = []
        self.stats_at = 0.0
        self.idle = True

    def run(self) -> None:
        """Until a Shutdown; raises PeerGoneError when the parent is gone."""
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        wait = self._step()  # nothing to do yet; but /metrics knows from the start how much room there is
        while True:
            for message in self.channel.receive(decoder, wait):
                if isinstance(message, Shutdown):
                    return
                self._take(message)
            wait = self._step()

    def _take(self, message: AddRequest | AbortRequests | Call) -> None:
        self.idle = False  # whatever it changes, the statistics that follow tell
        if isinstance(message, AddRequest):
            try:
                self.core.add_request(message)
            except SpecserveError as error:
                self.refused.append(
                    RequestOutput(request_id=message.request_id, finish_reason="error", error=ErrorInfo.of(error))
                )
        elif isinstance(message, AbortRequests):
            self.core.abort_requests(message.request_ids)
        else:
            self._call(message)

    def _call(self, call: Call) -> None:
        try:
            reply = self.core.handle(call)
        except SpecserveError as error:
            reply = Reply(call_id=call.call_id, error=ErrorInfo.of(error))
        if reply is not None:
            self.channel.send(reply)

    def _step(self) -> float | None:
        """One step; returns how long the loop may wait for messages before the next (None: until one comes)."""
        outputs = self.refused
        self.refused = []
        if self.core.has_work():
            outputs += self.core.step()
        for reply in self.core.poll_replies():
            self.channel.send(reply)
        busy = self.core.has_work()
        self._report(outputs, busy)
        return 0.0 if busy else None

    def _report(self, outputs: list[RequestOutput], busy: bool) -> None:
        """Send the step's outputs; statistics go along at most every STATS_INTERVAL, and once on falling idle."""
        now = time.monotonic()
        due = now - self.stats_at >= STATS_INTERVAL or (not busy and not self.idle)
        self.idle = not busy
        if not outputs and not due:
            return
        if due:
            self.stats_at = now
        self.channel.send(StepOutputs(outputs=outputs, stats=self.core.stats() if due else None))


def run(sock: socket.socket, make_core: Callable[[EngineConfig], Core]) -> int:
    """Serve one parent over `sock`; returns the process's exit status."""
    channel = Channel(sock)
    core: Core | None = None
    try:
        config = channel.receive_one(msgspec.msgpack.Decoder(EngineConfig))
        try:
            core = make_core(config)
        except SpecserveError as error:
            channel.send(Failed(error=ErrorInfo.of(error)))
            return 2
        channel.send(core.ready)
        _Loop(channel, core).run()
        return 0
    except PeerGoneError:
        return 0
    except Exception:
        logger.exception("The engine met an unexpected error and ends.")
        return 1
    finally:
        if core is not None:
            core.close()
        sock.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specserve.engine.core.process")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a socketpair")
    parser.add_argument("--core", required=True, help="module:factory that makes the core from an EngineConfig")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to drain on; it then closes the socket
    module, _, factory = args.core.partition(":")
    make_core = getattr(importlib.import_module(module), factory)

    def make_and_freeze(config: EngineConfig) -> Core:
        core: Core = make_core(config)
        gc.freeze()  # else a collection now and then looks at all of the libraries' objects, for some 200 ms in a step
        return core

    return run(socket.socket(fileno=args.fd), make_and_freeze)


if __name__ == "__main__":
    sys.exit(main())
