"""A running server's HTTP API, for commands: one JSON call, its answer or one sentence."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

TIMEOUT = 600.0  # seconds; loading from a slow disk takes a while


class ServerAnsweredError(Exception):
    """The server refused, or there is none; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class Api:
    """Where the server is, and the key that it asks for, if any."""

    url: str
    key: str | None = None

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's JSON answer; raises ServerAnsweredError with its message."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ServerAnsweredError(_message(error)) from error
        except TimeoutError as error:
            raise ServerAnsweredError(f"No answer from {self.url} within {TIMEOUT:.0f} s.") from error
        except (OSError, ValueError) as error:
            raise ServerAnsweredError(f"No specserve server answers at {self.url}: {error}") from error

    def adapter(self, method: str, name: str, body: dict[str, Any] | None = None, *, action: str = "") -> Any:
        """A call of /v1/adapters/{name}."""
        return self.call(method, f"/v1/adapters/{urllib.parse.quote(name, safe='')}{action}", body)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {error.code} {error.reason}."
