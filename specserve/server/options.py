"""ServerConfig: what the HTTP side is told, beside the engine's EngineConfig."""

from __future__ import annotations

import msgspec


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the HTTP server is built from. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one, printed at start
    api_key: str | None = None
    served_model_name: tuple[str, ...] = ()  # default: the model as it was given; the first one names answers
    adapter_root: tuple[str, ...] = ()  # adapters are loaded over HTTP from under these folders alone
    drain_timeout: float = 60.0  # on SIGTERM, how long running requests may take to finish
    max_body_bytes: int = 64 << 20
