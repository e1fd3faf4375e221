"""`specserve adapters {list,load,reload,unload,pin,unpin}`: talk to a running server's /v1/adapters. And `distill`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from specserve.cli.api import Api, ServerAnsweredError
from specserve.cli.distill import add_distill
from specserve.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED
from specserve.cli.flags import name_and_path
from specserve.cli.progress import call_each
from specserve.cli.tables import SORTS, table
from specserve.config import adapters_in, environment_api_key
from specserve.core.checks import check_weight
from specserve.core.errors import InvalidRequestError

Act = Callable[[argparse.Namespace, Api], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_list(actions)
    _add_load(actions)
    for name, text, act in (
        ("reload", "read folders again; running requests keep their version", reload_adapters),
        ("unload", "forget adapters", unload_adapters),
        ("pin", "keep adapters on the device", partial(pin_adapters, pinned=True)),
        ("unpin", "let adapters be evicted again", partial(pin_adapters, pinned=False)),
    ):
        _action(actions, name, text, act).add_argument("names", nargs="+", metavar="NAME")
    add_distill(actions)


def _add_list(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    shown = _action(actions, "list", "show every adapter", list_adapters)
    shown.add_argument("--sort", choices=list(SORTS), help="default: the order of registration")
    shown.add_argument("--tier", choices=("disk", "host", "device"), help="only those that are there")
    shown.add_argument("--limit", type=int, metavar="N", help="at most so many")
    shown.add_argument("--json", action="store_true", help="everything the server tells, as JSON")


def _add_load(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    load = _action(
        actions,
        "load",
        "load adapters: NAME PATH, NAME=PATH …, or --all FOLDER; those that are loaded already with --replace",
        load_adapters,
    )
    load.add_argument(
        "what",
        nargs="*",
        metavar="NAME PATH | NAME=PATH …",
        help="PEFT folders on the server's machine, under one of its --adapter-root folders",
    )
    load.add_argument("--all", metavar="FOLDER", help="each subfolder, under its own name")
    load.add_argument("--draft-path", help="draft companion of the one adapter; default: the subfolder draft/")
    load.add_argument("--pinned", action="store_true", help="keep on the device")
    load.add_argument("--weight", type=_weight, metavar="X", help="share of tokens beside other adapters [1]")
    load.add_argument("--replace", action="store_true", help="reload names; running requests keep their version")


def run(args: argparse.Namespace) -> int:
    """Do the action; 1 and a sentence on stderr for whatever the server refuses, or if it is not there."""
    act: Act = args.act
    try:
        return act(args, Api(args.url, args.api_key or environment_api_key()))
    except (ServerAnsweredError, InvalidRequestError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        _failed("interrupted; what the server has begun goes on there.")
        return EXIT_INTERRUPTED


def list_adapters(args: argparse.Namespace, api: Api) -> int:
    infos = [info for info in api.call("GET", "/v1/adapters")["data"] if args.tier in (None, info["tier"])]
    if args.sort is not None:
        infos.sort(key=SORTS[args.sort])
    shown = infos if args.limit is None else infos[: max(args.limit, 0)]
    print(json.dumps(shown, indent=2) if args.json else table(shown))
    if len(shown) < len(infos):
        print(f"{len(infos) - len(shown)} more are not shown.", file=sys.stderr)
    return 0


def load_adapters(args: argparse.Namespace, api: Api) -> int:
    paths = _named_paths(args)
    if args.draft_path is not None and len(paths) != 1:
        raise InvalidRequestError("--draft-path goes with one adapter; others bring their companion in draft/.")
    common: dict[str, Any] = {}
    if args.draft_path is not None:
        common["draft_path"] = os.path.abspath(args.draft_path)
    if args.pinned:
        common["pinned"] = True
    if args.weight is not None:
        common["weight"] = args.weight
    known = {info["name"] for info in api.call("GET", "/v1/adapters")["data"]}  # and no server is one error, not many
    calls: dict[str, Callable[[], Any]] = {}
    for name, path in paths.items():
        # A relative path is the caller's: the server's working folder is another.
        body = {"path": os.path.abspath(path), **common}
        if args.replace and name in known:
            calls[name] = partial(api.adapter, "PUT", name, body)
        else:
            calls[name] = partial(api.call, "POST", "/v1/adapters", {"name": name, **body})
    return _do("Loading", calls)


def reload_adapters(args: argparse.Namespace, api: Api) -> int:
    return _do("Reloading", {name: partial(api.adapter, "PUT", name) for name in args.names})


def unload_adapters(args: argparse.Namespace, api: Api) -> int:
    return _do("Unloading", {name: partial(api.adapter, "DELETE", name) for name in args.names}, said="Unloaded")


def pin_adapters(args: argparse.Namespace, api: Api, *, pinned: bool) -> int:
    pin = partial(api.adapter, "POST", body={"pinned": pinned}, action="/pin")
    return _do("Pinning" if pinned else "Unpinning", {name: partial(pin, name) for name in args.names})


def _do(title: str, calls: dict[str, Callable[[], Any]], *, said: str | None = None) -> int:
    """Make the calls, show what came of them in one table (or in a word), and list what went wrong."""
    answers, errors = call_each(title, calls)
    if answers and said is not None:
        print(f"{said} {', '.join(answers)}.")
    elif answers:
        print(table(list(answers.values())))
    for name, message in errors.items():
        _failed(message if repr(name) in message else f"{name!r}: {message}")
    if errors and len(calls) > 1:
        print(f"{len(errors)} of {len(calls)} adapters failed.", file=sys.stderr)
    return EXIT_FAILED if errors else 0


def _named_paths(args: argparse.Namespace) -> dict[str, str]:
    """{name: path} of whatever way the adapters were named in."""
    pairs = _pairs(args.what) + (adapters_in(args.all) if args.all is not None else [])
    if not pairs:
        nothing = "name adapters as NAME PATH, NAME=PATH … or --all FOLDER."
        raise InvalidRequestError(nothing if args.all is None else f"--all {args.all!r} has no subfolder; {nothing}")
    name, count = Counter(name for name, _ in pairs).most_common(1)[0]
    if count > 1:
        raise InvalidRequestError(f"the adapter {name!r} is named more than once.")
    return dict(pairs)


def _pairs(what: Iterable[str]) -> list[tuple[str, str]]:
    words = list(what)
    if len(words) == 2 and "=" not in words[0]:
        return [(words[0], words[1])]
    try:
        return [name_and_path(word) for word in words]
    except argparse.ArgumentTypeError as error:
        raise InvalidRequestError(f"{error}; one adapter may also be named as NAME PATH.") from error


def _weight(text: str) -> float:
    try:
        weight = float(text)
        check_weight(weight)
    except (ValueError, InvalidRequestError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return weight


def _failed(message: str) -> int:
    print(f"specserve: {message}", file=sys.stderr)
    return EXIT_FAILED


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, act: Act
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server [%(default)s]")
    parser.add_argument("--api-key", default=None, help="default: SPECSERVE_API_KEY")
    parser.set_defaults(run=run, act=act)
    return parser
