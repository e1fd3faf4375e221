"""/v1/adapters: list, load, look at, reload, unload and pin adapters while requests run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from specserve.core.checks import check_weight
from specserve.core.errors import AdapterBusyError, ForbiddenError, InvalidRequestError, NotFoundError
from specserve.core.messages import AdapterInfo, ListAdapters, LoadAdapter, PinAdapter, UnloadAdapter
from specserve.server.errors import json_response, read_body
from specserve.server.state import STATE, ServerState

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class LoadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    path: str
    draft_path: str | None = None
    pinned: bool = False
    weight: float | None = None  # share of tokens beside other adapters; 1.0 for a new name


class ReloadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is left out stays: the folder that it came from is read again."""

    path: str | None = None
    draft_path: str | None = None
    pinned: bool | None = None
    weight: float | None = None


class PinBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pinned: bool = True


async def list_adapters(request: web.Request) -> web.Response:
    infos = await request.app[STATE].engine.call(ListAdapters(call_id=0))
    return json_response({"object": "list", "data": [_adapter(info) for info in infos]})


async def load_adapter(request: web.Request) -> web.Response:
    """POST: a new name. One that is taken is reloaded by PUT."""
    body = await read_body(request, LoadBody)
    return json_response(await load(request.app[STATE], body), status=201)


async def get_adapter(request: web.Request) -> web.Response:
    name = _known(request)
    return json_response(_told(await request.app[STATE].engine.call(ListAdapters(call_id=0, name=name)), name))


async def reload_adapter(request: web.Request) -> web.Response:
    """PUT: read the folder again, or another; running requests finish on the version that they began with."""
    state, name = request.app[STATE], _known(request)
    body = await read_body(request, ReloadBody) if request.can_read_body else ReloadBody()
    last = state.engine.adapters.load(name)
    roots = state.config.adapter_root
    call = LoadAdapter(
        call_id=0,
        name=name,
        # The operator's own choice (--lora) may lie anywhere; only a path that a request brings is contained.
        path=last.path if body.path is None else contained(body.path, roots, "path"),
        draft_path=_draft_path(body, last, roots),
        pinned=last.pinned if body.pinned is None else body.pinned,
        weight=_weight(body.weight, last),
        replace=True,
    )
    infos = await state.engine.call(call)
    if last.pinned and not call.pinned:  # a load pins, but never unpins
        infos = await state.engine.call(PinAdapter(call_id=0, name=name, pinned=False))
    return json_response(_told(infos, name))


async def unload_adapter(request: web.Request) -> web.Response:
    name = _known(request)
    await request.app[STATE].engine.call(UnloadAdapter(call_id=0, name=name))
    return json_response({"name": name, "object": "adapter", "deleted": True})


async def pin_adapter(request: web.Request) -> web.Response:
    state, name = request.app[STATE], _known(request)
    body = await read_body(request, PinBody) if request.can_read_body else PinBody()
    return json_response(_told(await state.engine.call(PinAdapter(call_id=0, name=name, pinned=body.pinned)), name))


async def load(state: ServerState, body: LoadBody, *, replace: bool = False) -> dict[str, Any]:
    """Load an adapter that an HTTP request names; returns it as the API shows it."""
    check_name(body.name, state.model_names)
    last = state.engine.adapters.load(body.name) if body.name in state.engine.adapters else None
    if last is not None and not replace:
        raise AdapterBusyError(
            f"The adapter {body.name!r} is loaded already; reload it with PUT /v1/adapters/{body.name} or "
            f"`specserve adapters reload {body.name}`.",
            param="name",
        )
    roots = state.config.adapter_root
    call = LoadAdapter(
        call_id=0,
        name=body.name,
        path=contained(body.path, roots, "path"),
        draft_path=None if body.draft_path is None else contained(body.draft_path, roots, "draft_path"),
        pinned=body.pinned or (last is not None and last.pinned),
        weight=_weight(body.weight, last),
        replace=replace,
    )
    return _told(await state.engine.call(call), body.name)


def check_name(name: str, base_names: Sequence[str]) -> None:
    """A name is safe in URLs, labels and messages, and not the base model's."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"The adapter name {name!r} must be 1 to 128 of the characters A-Z a-z 0-9 . _ -", param="name"
        )
    if name in base_names:
        raise InvalidRequestError(f"The adapter name {name!r} is the base model's.", param="name")


def contained(path: str, roots: Sequence[str], param: str) -> str:
    """The real path, links resolved, if it lies under a root; else ForbiddenError."""
    if not roots:
        raise ForbiddenError(
            "Adapters are not loaded over HTTP: start the server with --adapter-root FOLDER to allow those under it.",
            param=param,
        )
    if "\0" in path:
        raise InvalidRequestError(f"{param} holds a NUL character.", param=param)
    real = os.path.realpath(path)
    for root in map(os.path.realpath, roots):
        if real == root or real.startswith(os.path.join(root, "")):
            return real
    raise ForbiddenError(
        f"{param} {path!r} lies outside every --adapter-root: move it under one, or start the server with another.",
        param=param,
    )


def _draft_path(body: ReloadBody, last: LoadAdapter, roots: Sequence[str]) -> str | None:
    if body.draft_path is not None:
        return contained(body.draft_path, roots, "draft_path")
    # Another folder brings its own companion, in its subfolder draft/.
    return last.draft_path if body.path is None else None


def _known(request: web.Request) -> str:
    name = request.match_info["name"]
    if name not in request.app[STATE].engine.adapters:
        raise NotFoundError(f"The adapter {name!r} does not exist; GET /v1/adapters lists those that do.", param="name")
    return name


def _weight(asked: float | None, last: LoadAdapter | None) -> float:
    """What a load asks for, else what the name had. Raises InvalidRequestError out of range."""
    if asked is None:
        return 1.0 if last is None else last.weight
    check_weight(asked)
    return asked


def _told(infos: Sequence[AdapterInfo], name: str) -> dict[str, Any]:
    """The adapter that the engine answered with."""
    if not infos:
        raise NotFoundError(f"The adapter {name!r} does not exist any more.", param="name")
    return _adapter(infos[0])


def _adapter(info: AdapterInfo) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(info)
    acceptance = info.accepted / info.drafted if info.drafted else None
    return {"object": "adapter", **fields, "acceptance": acceptance}
