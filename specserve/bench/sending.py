"""One run of a comparison: a trace sent to a server under a load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specserve.bench.client import connect
from specserve.bench.load import run_load
from specserve.bench.records import Load, RequestRecord, TracedRequest
from specserve.bench.servers import RunningServer, ServerFailedError
from specserve.bench.target import COMPLETIONS, Target, ask_version, look
from specserve.core.errors import InvalidRequestError


class Sending:
    """Measures by streaming requests. Each server is asked once whose it is and what its model is called."""

    def __init__(self, *, endpoint: str = COMPLETIONS, headers: Mapping[str, str] | None = None) -> None:
        self._endpoint, self._headers = endpoint, dict(headers or {})
        self._targets: dict[str, Target] = {}  # by URL: a server that is started again has another port

    async def facts(self, server: RunningServer) -> dict[str, Any]:
        """What it tells of itself; raises ServerFailedError for one that is no such server."""
        target = await self._target(server)
        return {"engine": target.engine, "model": target.model} | await ask_version(target)

    async def run(
        self, server: RunningServer, trace: Sequence[TracedRequest], load: Load, ended: Callable[[RequestRecord], None]
    ) -> float:
        """Send the trace; `ended` gets every record. Returns seconds from the first request sent to the last end.

        Raises ServerFailedError for a server that is no such server, or cannot take the trace.
        """
        target = await self._target(server)
        if not target.takes_ids and any(isinstance(request.prompt, list) for request in trace):
            name = server.variant.name
            raise ServerFailedError(name, f"{name} takes no prompts of token ids: choose a dataset of texts.")
        at_once = int(load["concurrency"]) if "concurrency" in load else None
        async with connect(target) as client:
            run = await run_load(client, trace, max_concurrency=at_once, on_end=ended)
        return run.duration

    async def _target(self, server: RunningServer) -> Target:
        if server.url in self._targets:
            return self._targets[server.url]
        try:
            found = await look(server.url, self._headers)
        except InvalidRequestError as error:
            raise ServerFailedError(server.variant.name, f"{server.variant.name}: {error}") from error
        self._targets[server.url] = Target(
            url=server.url,
            engine=found.engine,
            model=server.variant.model or found.model,
            endpoint=self._endpoint,
            headers=self._headers,
        )
        return self._targets[server.url]
