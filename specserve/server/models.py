"""GET /v1/models: the base model and its adapters; GET /v1/models/{name}."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from specserve.core.errors import NotFoundError
from specserve.server.errors import json_response
from specserve.server.state import STATE, ServerState


async def list_models(request: web.Request) -> web.Response:
    """Base model first, then the adapters, each a name that `model` takes."""
    return json_response({"object": "list", "data": list(_models(request.app[STATE]).values())})


async def get_model(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    model = _models(request.app[STATE]).get(name)
    if model is None:
        raise NotFoundError(f"The model {name!r} does not exist; GET /v1/models lists those that do.", param="model")
    return json_response(model)


def _models(state: ServerState) -> dict[str, dict[str, Any]]:
    base = state.model_names[0]
    adapters = state.engine.adapters
    models = {name: _model(state, name, state.engine.config.model, None) for name in state.model_names}
    return models | {name: _model(state, name, adapters.load(name).path, base) for name in adapters.names}


def _model(state: ServerState, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "specserve",
        "root": root,
        "parent": parent,
        "max_model_len": state.engine.ready.max_model_len,
    }
