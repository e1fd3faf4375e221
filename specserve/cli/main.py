"""The `specserve` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each is told to `add_arguments(parser)` in its module, which is imported when its command is given and not before: a
# server shall not wait for what benchmarks need.
COMMANDS = {
    "serve": "start a server",
    "adapters": "list, load, unload and pin the adapters of a server; distill companions",
    "bench": "measure servers, or the engine without one",
}


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """`only`: the command that is given; the others are then names without flags. None: all of them are wanted."""
    parser = argparse.ArgumentParser(
        prog="specserve", description="One base model, many LoRA adapters, each made faster by speculative decoding."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if only in (None, name):
            importlib.import_module(f"specserve.cli.{name}").add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(next(iter(words), "")).parse_args(words)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
