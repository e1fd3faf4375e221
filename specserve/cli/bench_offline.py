"""`specserve bench throughput` and `latency`: the engine in this process, without HTTP."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from tqdm import tqdm

from specserve.bench.facts import append_line, check_writable, surroundings
from specserve.bench.latency import bench_latency
from specserve.bench.options import TRACE_HELP, TraceOptions
from specserve.bench.throughput import bench_throughput
from specserve.cli.bench_flags import add_trace_flags, trace_options
from specserve.cli.exits import EXIT_INTERRUPTED, EXIT_REFUSED
from specserve.cli.flags import ENGINE_HELP, add_flags, from_flags, name_and_path
from specserve.config import EngineConfig
from specserve.core.errors import SpecserveError

BAR = "{desc} {n_fmt}/{total_fmt} iterations |{bar:20}| {elapsed}"
# Nothing arrives: all requests are begun at once.
TIMED = ("request_rate", "burstiness", "ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps", "self_timed",
         "timed_trace_sec_multiplier")  # fmt: skip
OFFLINE_HELP = {name: text for name, text in TRACE_HELP.items() if name not in TIMED}


class Measured(Protocol):
    @property
    def made(self) -> dict[str, str]: ...

    def text(self) -> str: ...

    def flat(self) -> object: ...


def add_throughput(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "all requests at once through the engine alone: tokens and requests a second"
    parser = _add(actions, "throughput", text, OFFLINE_HELP, _throughput)
    _count(parser, "--num-warmups", 8, "requests generated before, uncounted", least=0)


def add_latency(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "how long the engine alone takes for one batch"
    helps = {name: text for name, text in OFFLINE_HELP.items() if name != "num_prompts"}
    parser = _add(actions, "latency", text, helps, _latency)
    _count(parser, "--batch-size", 8, "requests, all begun together", dest="num_prompts")
    _count(parser, "--num-iters-warmup", 3, "times that the batch is generated before, uncounted", least=0)
    _count(parser, "--num-iters", 10, "times that the batch is generated")


def _count(
    parser: argparse.ArgumentParser, flag: str, default: int, text: str, dest: str | None = None, least: int = 1
) -> None:
    def count(given: str) -> int:
        if not given.isdecimal() or int(given) < least:
            raise argparse.ArgumentTypeError(f"{given!r} is no number from {least} on")
        return int(given)

    dest = dest or flag.removeprefix("--").replace("-", "_")
    parser.add_argument(flag, dest=dest, type=count, default=default, metavar="N", help=f"{text} [{default}]")


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    helps: dict[str, str],
    act: Callable[[argparse.Namespace, EngineConfig, TraceOptions], Measured],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--output-json", metavar="FILE", help="add the figures to this file of JSON lines")
    add_trace_flags(parser, helps | {"ignore_eos": "generate all tokens asked for, as by default here"})
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default="demo", help="folder or hub id [%(default)s]")
    group.add_argument(
        "--lora", dest="loras", type=name_and_path, action="append", metavar="NAME=PATH",
        default=argparse.SUPPRESS, help="an adapter: a PEFT folder; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--lora-dir", dest="lora_dirs", action="append", metavar="FOLDER",
        default=argparse.SUPPRESS, help="every subfolder as an adapter of its name; may be repeated",
    )  # fmt: skip
    add_flags(group, EngineConfig, {name: text for name, text in ENGINE_HELP.items() if name != "seed"})
    parser.set_defaults(run=run, act=act, ignore_eos=True)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 2 and a sentence on stderr for what cannot be."""
    engine, asked = from_flags(EngineConfig, args), trace_options(args)
    try:
        if args.output_json is not None:
            check_writable(Path(args.output_json), "output_json")
        measured: Measured = args.act(args, engine, asked)
    except SpecserveError as error:
        print(f"specserve: {str(error).strip()}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("specserve: interrupted; nothing was measured to its end.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(measured.text())
    if args.output_json is not None:
        options = {"trace": asked, "engine": msgspec.structs.asdict(engine)}
        found = {"made": measured.made, "metrics": measured.flat()}
        append_line(Path(args.output_json), surroundings() | options | found)
        print(f"Added to {args.output_json}.")
    return 0


def _throughput(args: argparse.Namespace, engine: EngineConfig, asked: TraceOptions) -> Measured:
    return bench_throughput(engine, asked, num_warmups=args.num_warmups, progress=sys.stderr.isatty())


def _latency(args: argparse.Namespace, engine: EngineConfig, asked: TraceOptions) -> Measured:
    iterations, warm_ups = args.num_iters, args.num_iters_warmup
    total = iterations + warm_ups
    # disable=None: shown on a terminal alone.
    with tqdm(desc="Generating", total=total, bar_format=BAR, disable=None, leave=False) as bar:

        def on_iteration() -> None:
            bar.update()

        return bench_latency(
            engine, asked, iterations=iterations, warm_ups=warm_ups, on_iteration=on_iteration,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
