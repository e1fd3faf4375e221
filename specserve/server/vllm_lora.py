"""vLLM's two LoRA routes: POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from aiohttp import web

from specserve.core.errors import NotFoundError, SpecserveError
from specserve.core.messages import UnloadAdapter
from specserve.server.adapters import LoadBody, load
from specserve.server.errors import read_body
from specserve.server.state import STATE

_FIELDS = {"name": "lora_name", "path": "lora_path"}  # those of a load here, as these bodies call them


class LoadLoraBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    lora_name: str
    lora_path: str
    load_inplace: bool = False  # reload a name that is taken
    base_model_name: str | None = None  # accepted as vLLM does; there is one base


class UnloadLoraBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    lora_name: str
    lora_int_id: int | None = None  # accepted; adapters have no numbers here


async def load_lora_adapter(request: web.Request) -> web.Response:
    body = await read_body(request, LoadLoraBody)
    with _bodys_names():
        await load(request.app[STATE], LoadBody(name=body.lora_name, path=body.lora_path), replace=body.load_inplace)
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(request: web.Request) -> web.Response:
    body = await read_body(request, UnloadLoraBody)
    engine = request.app[STATE].engine
    if body.lora_name not in engine.adapters:
        raise NotFoundError(f"The adapter {body.lora_name!r} does not exist.", param="lora_name")
    with _bodys_names():
        await engine.call(UnloadAdapter(call_id=0, name=body.lora_name))
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@contextmanager
def _bodys_names() -> Iterator[None]:
    """Errors about a field name the one that the client sent."""
    try:
        yield
    except SpecserveError as error:
        param = _FIELDS.get(error.param or "")
        if param is None:
            raise
        # Some messages begin with the field's name.
        rest = error.message.removeprefix(f"{error.param} ")
        message = error.message if rest == error.message else f"{param} {rest}"
        raise type(error)(message, param=param) from error
