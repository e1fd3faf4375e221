"""Every failure leaves as OpenAI's error body: {"error": {"message", "type", "param", "code"}}, with its status."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from specserve.core.errors import AuthenticationError, InvalidRequestError, SpecserveError
from specserve.server.body_hints import hint
from specserve.server.state import STATE

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")

_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


class DrainingError(SpecserveError):
    """The server is shutting down and takes no new requests."""

    status = 503
    type = "service_unavailable"
    code = "shutting_down"


def error_body(error: SpecserveError) -> dict[str, Any]:
    """OpenAI's error object, without its wrapper."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer of plain data or msgspec structs."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def error_response(error: SpecserveError) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    if error.status in (429, 503):
        headers = {"Retry-After": "1"}
    return json_response({"error": error_body(error)}, error.status, headers)


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The one place where exceptions become answers. What is not a user's error is logged and stays unexplained."""
    try:
        return await handler(request)
    except SpecserveError as error:
        return error_response(error)
    except web.HTTPException as error:
        code = _HTTP_CODES.get(error.status, "http_error")
        message = f"{request.method} {request.path}: {error.reason}."
        body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return json_response({"error": body}, error.status, headers)
    except ConnectionResetError:
        raise  # the client has gone: nobody is left to answer
    except Exception:
        logger.exception("%s %s failed.", request.method, request.path)
        return error_response(SpecserveError("Internal error; the server's log has the details."))


@web.middleware
async def access_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check the API key, refuse new work while draining, count what is being answered."""
    state = request.app[STATE]
    if request.path in _OPEN_PATHS:
        return await handler(request)
    _check_key(request, state.config.api_key)
    if state.draining:
        raise DrainingError("The server is shutting down.")
    state.in_flight += 1
    try:
        return await handler(request)
    finally:
        state.in_flight -= 1


def _check_key(request: web.Request, api_key: str | None) -> None:
    if api_key is None:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        raise AuthenticationError("Missing or wrong API key: send it as 'Authorization: Bearer KEY'.")


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The JSON body as a `kind`; raises InvalidRequestError naming the field that is missing, unknown or wrong, and
    what is known or allowed in its place."""
    data = await request.read()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        said = str(error)
        raise InvalidRequestError(f"{said}{hint(said, kind)}.", param=_field_of(said)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The body is no valid JSON: {error}.") from error


def _field_of(message: str) -> str | None:
    """The field that a msgspec message is about: `$.messages[0]` and `unknown field `x`` give messages[0].x."""
    path = re.search(r"`\$\.?([^`]*)`", message)
    name = re.search(r"(?:unknown|required) field `([^`]*)`", message)
    parts = [match.group(1) for match in (path, name) if match and match.group(1)]
    return ".".join(parts) or None
