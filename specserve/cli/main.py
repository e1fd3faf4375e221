"""The `specserve` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from specserve.cli.adapters import add_adapters
from specserve.cli.bench import add_bench
from specserve.cli.serve import add_serve


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve", description="One base model, many LoRA adapters, each made faster by speculative decoding."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_serve(commands)
    add_adapters(commands)
    add_bench(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = make_parser().parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
