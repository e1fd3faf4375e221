"""The aiohttp application: every route of the server in one place."""

from __future__ import annotations

from aiohttp import web

from specserve.server import adapters, chat, completions, health, models, tokenize, vllm_lora
from specserve.server.errors import access_middleware, errors_middleware
from specserve.server.state import STATE, ServerState


def make_app(state: ServerState) -> web.Application:
    """An application over a started engine."""
    app = web.Application(
        middlewares=[errors_middleware, access_middleware], client_max_size=state.config.max_body_bytes
    )
    app[STATE] = state
    app.add_routes(
        [
            web.post("/v1/completions", completions.completions),
            web.post("/v1/chat/completions", chat.chat_completions),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{name:.+}", models.get_model),
            web.get("/v1/adapters", adapters.list_adapters),
            web.post("/v1/adapters", adapters.load_adapter),
            web.get("/v1/adapters/{name}", adapters.get_adapter),
            web.put("/v1/adapters/{name}", adapters.reload_adapter),
            web.delete("/v1/adapters/{name}", adapters.unload_adapter),
            web.post("/v1/adapters/{name}/pin", adapters.pin_adapter),
            web.post("/v1/load_lora_adapter", vllm_lora.load_lora_adapter),
            web.post("/v1/unload_lora_adapter", vllm_lora.unload_lora_adapter),
            web.post("/tokenize", tokenize.tokenize),
            web.post("/detokenize", tokenize.detokenize),
            web.get("/health", health.health),
            web.get("/ready", health.ready),
            web.get("/version", health.version),
            web.get("/metrics", health.metrics),
        ]
    )
    return app
