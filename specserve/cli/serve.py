"""`specserve serve [MODEL]`: the server from the command line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections import Counter

import msgspec

from specserve.cli.exits import EXIT_REFUSED
from specserve.cli.flags import ENGINE_HELP, SERVER_HELP, add_flags, from_flags, name_and_path
from specserve.config import DEMO_ROOT, EngineConfig, environment_api_key, missing_file, resolve_paths
from specserve.core.errors import InvalidRequestError, SpecserveError
from specserve.server.adapters import check_name
from specserve.server.options import ServerConfig
from specserve.server.serve import PortInUseError, serve

MAX_SHOWN = 16  # adapters, at start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model with many adapters over OpenAI's API. Without MODEL: the bundled demo, offline."
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="folder or hub id")
    parser.add_argument(
        "--lora",
        dest="loras",
        type=name_and_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter to register at start: a PEFT folder; may be repeated",
    )
    parser.add_argument(
        "--lora-dir",
        dest="lora_dirs",
        action="append",
        default=[],
        metavar="FOLDER",
        help="register every subfolder as an adapter of its name; may be repeated",
    )
    add_flags(parser.add_argument_group("server"), ServerConfig, SERVER_HELP)
    add_flags(parser.add_argument_group("engine"), EngineConfig, ENGINE_HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 2 and one sentence on stderr where the start is refused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        engine, server = configs(args)
        _check_folders(engine)
        print(describe(engine, server), flush=True)
        asyncio.run(serve(engine, server, on_ready=lambda url: print(f"Ready: {url}", flush=True)))
    except (SpecserveError, PortInUseError) as error:
        print(f"specserve: {str(error).strip()}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def configs(args: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    """Both configs, resolved: folders filled in, the API key taken from the environment."""
    given = from_flags(EngineConfig, args, loras=tuple(args.loras), lora_dirs=tuple(args.lora_dirs))
    engine = resolve_paths(given)
    server = from_flags(ServerConfig, args)
    server = msgspec.structs.replace(
        server,
        api_key=server.api_key or environment_api_key(),
        served_model_name=server.served_model_name or (given.model,),
        adapter_root=server.adapter_root + ((str(DEMO_ROOT),) if given.model == "demo" else ()),
    )
    _check(engine, server)
    return engine, server


def _check(engine: EngineConfig, server: ServerConfig) -> None:
    for name, count in Counter(name for name, _ in engine.loras).items():
        check_name(name, server.served_model_name)
        if count > 1:
            raise InvalidRequestError(f"--lora names {name!r} more than once.", param="lora")
    for root in server.adapter_root:
        if not os.path.isdir(root):
            raise InvalidRequestError(f"--adapter-root {root!r} is no folder.", param="adapter_root")


def _check_folders(engine: EngineConfig) -> None:
    """The engine looks too, but after minutes of loading the model."""
    for name, path in engine.loras:
        missing = missing_file(path)
        if missing is not None:
            raise InvalidRequestError(f"Adapter {name!r}: {path} has no {missing}.", param="loras")


def describe(engine: EngineConfig, server: ServerConfig) -> str:
    """The resolved config, a line a field; the key is not shown."""
    shown = msgspec.structs.replace(server, api_key="(set)" if server.api_key else None)
    fields = {**msgspec.structs.asdict(engine), **msgspec.structs.asdict(shown)}
    if len(engine.loras) > MAX_SHOWN:
        fields["loras"] = (
            f"{len(engine.loras)} adapters, the first of them {engine.loras[0][0]} and the last {engine.loras[-1][0]}"
        )
    width = max(map(len, fields))
    return "\n".join(["specserve serves with", *(f"  {name:<{width}}  {value}" for name, value in fields.items())])
