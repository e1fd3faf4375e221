"""GET /health (the server runs), /ready (it can serve now), /version and /metrics: open, whatever the API key."""

from __future__ import annotations

import importlib.metadata

from aiohttp import web

from specserve.server.errors import json_response
from specserve.server.state import STATE


async def health(request: web.Request) -> web.Response:
    """200 while the server runs; an engine that is being restarted is no reason to kill it."""
    engine = request.app[STATE].engine
    return json_response(
        {"status": "ok", "engine": "alive" if engine.alive else "restarting", "engine_restarts": engine.restarts}
    )


async def ready(request: web.Request) -> web.Response:
    """200 when a request sent now would be taken, else 503 with the reason."""
    state = request.app[STATE]
    if state.ready:
        return json_response({"ready": True})
    reason = "shutting down" if state.draining else "the engine is being restarted"
    return json_response({"ready": False, "reason": reason}, status=503)


async def version(request: web.Request) -> web.Response:
    """Of the package, and what the engine runs on and in: who measures it writes that down."""
    return json_response({"version": package_version(), **request.app[STATE].engine.ready.facts()})


async def metrics(request: web.Request) -> web.Response:
    data, content_type = request.app[STATE].metrics.render()
    return web.Response(body=data, headers={"Content-Type": content_type})


def package_version() -> str:
    """Of the installed package; a source tree on the path has none."""
    try:
        return importlib.metadata.version("specserve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
