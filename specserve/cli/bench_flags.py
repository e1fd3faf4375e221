"""The flags of a trace, which all commands of `specserve bench` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from specserve.bench.metrics import Slos
from specserve.bench.options import TRACE_HELP, TraceOptions
from specserve.cli.flags import add_flags, from_flags

# vLLM's names of --input-len and --output-len, one for each dataset.
ALIASES = {
    "--random-input-len": "input_len", "--random-output-len": "output_len", "--sharegpt-output-len": "output_len",
    "--custom-output-len": "output_len",
}  # fmt: skip


def add_trace_flags(parser: argparse.ArgumentParser, helps: Mapping[str, str] = TRACE_HELP) -> None:
    """Flags for the fields that `helps` describes; names follow `vllm bench serve`."""
    group = parser.add_argument_group("requests")
    add_flags(group, TraceOptions, helps)
    for flag, field in ALIASES.items():
        group.add_argument(flag, dest=field, type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group.add_argument(
        "--lora-modules",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="adapters to ask for, the most popular one first; all: all that there are",
    )
    group.add_argument(
        "--extra-body",
        type=_json_object,
        metavar="JSON",
        default=argparse.SUPPRESS,
        help="further fields of every request: '{\"speculation\": false}'",
    )


def add_goodput(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="service level objectives, of ttft, tpot and e2el: how many requests a second keep all of them",
    )


def slos_of(args: argparse.Namespace) -> Slos | None:
    """None: none were set. Raises InvalidRequestError."""
    return Slos.parse(args.goodput) if args.goodput else None


def trace_options(args: argparse.Namespace) -> TraceOptions:
    return from_flags(TraceOptions, args)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
