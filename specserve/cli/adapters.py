"""`specserve adapters {list,load,unload,pin}`: talk to a running server's /v1/adapters."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from specserve.config import environment_api_key

TIMEOUT = 600.0  # seconds; loading from a slow disk takes a while


class ServerAnsweredError(Exception):
    """The server refused, or there is none; the text is one sentence."""


def add_adapters(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("adapters", help="list, load, unload and pin the adapters of a running server")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(actions, "list", "show every adapter", list_adapters)
    load = _action(actions, "load", "load an adapter, or reload it with --replace", load_adapter)
    load.add_argument("name")
    load.add_argument("path", help="PEFT folder on the server's machine, under one of its --adapter-root folders")
    load.add_argument("--draft-path", help="draft companion; default: the subfolder draft/")
    load.add_argument("--pinned", action="store_true", help="keep it on the device")
    load.add_argument("--replace", action="store_true", help="reload the name; running requests keep their version")
    _action(actions, "unload", "forget an adapter", unload_adapter).add_argument("name")
    pin = _action(actions, "pin", "keep an adapter on the device", pin_adapter)
    pin.add_argument("name")
    pin.add_argument("--off", action="store_true", help="let it be evicted again")


def run(args: argparse.Namespace) -> int:
    """Do the action; 1 and one sentence on stderr where the server refuses or is not there."""
    try:
        args.act(args)
    except ServerAnsweredError as error:
        print(f"specserve: {error}", file=sys.stderr)
        return 1
    return 0


def list_adapters(args: argparse.Namespace) -> None:
    print(table(_call(args, "GET", "/v1/adapters")["data"]))


def load_adapter(args: argparse.Namespace) -> None:
    # A relative path is the caller's: the server's working folder is another.
    body = {"path": os.path.abspath(args.path), "pinned": args.pinned}
    if args.draft_path is not None:
        body["draft_path"] = os.path.abspath(args.draft_path)
    if args.replace:
        info = _call(args, "PUT", f"/v1/adapters/{urllib.parse.quote(args.name, safe='')}", body)
    else:
        info = _call(args, "POST", "/v1/adapters", {"name": args.name, **body})
    print(table([info]))


def unload_adapter(args: argparse.Namespace) -> None:
    _call(args, "DELETE", f"/v1/adapters/{urllib.parse.quote(args.name, safe='')}")
    print(f"Unloaded {args.name}.")


def pin_adapter(args: argparse.Namespace) -> None:
    path = f"/v1/adapters/{urllib.parse.quote(args.name, safe='')}/pin"
    print(table([_call(args, "POST", path, {"pinned": not args.off})]))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def table(infos: list[dict[str, Any]]) -> str:
    """Adapters in aligned columns."""
    rows = [("NAME", "TIER", "SLOT", "RANK", "PINNED", "DRAFT", "REQUESTS", "TOKENS", "ACCEPTED", "VERSION")]
    for info in infos:
        acceptance, read = info["acceptance"], bool(info["version"])
        rows.append(
            (
                info["name"],
                info["tier"],
                "-" if info["slot"] is None else str(info["slot"]),
                str(info["rank"]) if read else "-",
                _yes(info["pinned"]),
                _yes(info["has_draft"]) if read else "-",
                str(info["requests"]),
                str(info["tokens"]),
                "-" if acceptance is None else f"{acceptance:.0%}",
                info["version"][:12] or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    act: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server [%(default)s]")
    parser.add_argument("--api-key", default=None, help="default: SPECSERVE_API_KEY")
    parser.set_defaults(run=run, act=act)
    return parser


def _call(args: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The server's JSON answer; raises ServerAnsweredError with its message."""
    headers = {"Content-Type": "application/json"}
    key = args.api_key or environment_api_key()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(args.url.rstrip("/") + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ServerAnsweredError(_message(error)) from error
    except (OSError, ValueError) as error:
        raise ServerAnsweredError(f"No specserve server answers at {args.url}: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {error.code} {error.reason}."
