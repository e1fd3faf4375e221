"""What the handlers of one server share; no globals, so that two servers live in one process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from aiohttp import web

from specserve.engine.client.async_engine import AsyncEngine
from specserve.server.metrics import Metrics
from specserve.server.options import ServerConfig


@dataclass(slots=True)
class ServerState:
    """One server's engine and settings. `draining` refuses new work; `in_flight` counts requests being answered."""

    engine: AsyncEngine
    config: ServerConfig
    metrics: Metrics
    model_names: tuple[str, ...]  # the base model's; the first one names answers
    draining: bool = False
    in_flight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))  # as /v1/models tells

    @property
    def ready(self) -> bool:
        return self.engine.alive and not self.draining


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)
