"""`specserve bench ab`: which of two servers is faster, by how much, and whether they answer the same."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from specserve.bench.ab import Outcome, compare
from specserve.bench.defaults import default_trace, plan_for
from specserve.bench.extra import needed
from specserve.bench.facts import surroundings
from specserve.bench.metrics import Slos
from specserve.bench.options import TRACE_HELP
from specserve.bench.plan import AbOptions
from specserve.bench.sending import Sending
from specserve.bench.target import CHAT, COMPLETIONS
from specserve.bench.variants import Variant, check_count, parse_variant, read_variants
from specserve.cli.bench_ab_watch import Progress, until_signalled
from specserve.cli.bench_flags import add_goodput, add_trace_flags, slos_of, trace_options
from specserve.cli.bench_report import show
from specserve.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED
from specserve.cli.flags import add_flags, from_flags
from specserve.config import environment_api_key
from specserve.core.errors import InvalidRequestError, SpecserveError

T = TypeVar("T", int, float)

AB_HELP = {
    "rounds": "runs of each side and load, in alternating order",
    "requests": "requests a run; default: twice the concurrency and some, or --seconds of a rate",
    "seconds": "how long requests come in a run at a rate",
    "warm_up": "requests that warm up each load and are not counted; default: as many as a run's",
    "minutes": "begin no round that would end later than so long after the start, servers' starts included",
    "one_at_a_time": "never run two servers at once: whole blocks, with restarts",
    "start_timeout": "seconds for a server to answer",
}
# A comparison has its own ways to say how many requests there are and when they come.
TRACE_FLAGS = {
    name: text for name, text in TRACE_HELP.items()
    if name not in ("num_prompts", "request_rate") and not name.startswith("ramp_up")
} | {"temperature": "0 unless given, but with --seeded the server's"}  # fmt: skip
EPILOG = """\
A side is flags of `specserve serve`, the URL of a server that runs, or the command of one that is installed:

  specserve bench ab
  specserve bench ab --a "" --b "--draft-model demo"
  specserve bench ab --model my/model --a "" --b "--draft-model my/draft" --concurrency 1,8,64
  specserve bench ab --a http://127.0.0.1:8000 --b http://127.0.0.1:8001 --rates 2,8
  specserve bench ab --a "specserve serve my/model" --b "vllm serve my/model"
  specserve bench ab --model my/model --a "--lora-dir adapters" --b "--lora-dir adapters --draft-model my/draft" \
    --lora-modules a b c d --adapters 0,1,4
  specserve bench ab --variants variants.yaml

The file has more than two, each compared with the first: {variants: {NAME: TEXT, …}, model: …}. Without sides: the
bundled demo, without and with its draft model."""


def add_ab(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "ab",
        help="compare servers, or settings of one",
        description="Measure servers in turn on the same requests: speed with intervals, and whether texts are equal.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--a", metavar="SIDE", help="flags of `specserve serve` (of one word: --a=--enforce-eager), a URL, or a command"
    )
    parser.add_argument("--b", metavar="SIDE", help="likewise; it is compared with the first")
    parser.add_argument("--variants", metavar="FILE", help="YAML of two or more sides, in place of --a and --b")
    parser.add_argument("--model", default="demo", help="what flags alone serve: folder, hub id or demo [%(default)s]")
    load = parser.add_argument_group("load").add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=partial(_numbers, int), default=(), metavar="N,N…", help="requests at a time [1,4,16]"
    )
    load.add_argument(
        "--rates", type=partial(_numbers, float), default=(), metavar="X,X…", help="requests/s, in place of that"
    )
    used = parser.add_argument_group("adapters, each number at each load").add_mutually_exclusive_group()
    used.add_argument(
        "--adapters", type=partial(_numbers, int), default=(), metavar="N,N…",
        help="how many of --lora-modules are asked for, the first ones; 0: the base model alone",
    )  # fmt: skip
    used.add_argument(
        "--ranks", type=partial(_numbers, int), default=(), metavar="R,R…",
        help="of --lora-modules those of this rank; 0: the base model alone",
    )  # fmt: skip
    add_flags(parser.add_argument_group("rounds"), AbOptions, AB_HELP)
    add_trace_flags(parser, TRACE_FLAGS)
    asked = parser.add_argument_group("servers")
    asked.add_argument("--tokenizer", help="folder or hub id, for random tokens; default: of the first side's model")
    asked.add_argument("--endpoint", choices=(COMPLETIONS, CHAT), default=COMPLETIONS)
    asked.add_argument("--api-key", help="of the servers; default: SPECSERVE_API_KEY")
    shown = parser.add_argument_group("result")
    add_goodput(shown)
    shown.add_argument("--output", metavar="FOLDER", help="of report, data and logs [specserve-ab-DATE]")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare and report; 2 for what is refused, 1 for what was cut short by a server, 130 by a signal."""
    try:
        needed("scipy.special", "A confidence interval")  # now, not after minutes of measuring
        variants = _variants(args)
        options = from_flags(AbOptions, args)
        trace = default_trace(trace_options(args), variants)
        plan = plan_for(variants, options, trace, args.tokenizer, _headers(args))
        slos = slos_of(args)
        folder = _folder(args.output)
    except SpecserveError as error:
        return _failed(str(error), EXIT_REFUSED)
    facts = surroundings() | {"requests": msgspec.to_builtins(trace), "rounds": options.rounds}
    sending = Sending(endpoint=args.endpoint, headers=_headers(args))
    with Progress() as progress:
        comparing = compare(variants, options, plan, sending, progress, folder=folder, facts=facts)
        outcome = asyncio.run(until_signalled(comparing, progress))
    return _report(outcome, folder, slos)


def _variants(args: argparse.Namespace) -> list[Variant]:
    if args.variants is not None:
        if args.a is not None or args.b is not None:
            raise InvalidRequestError("--variants names all sides: leave --a and --b out.", param="variants")
        found = read_variants(args.variants, args.model)
    elif args.a is None and args.b is None and args.model == "demo":
        found = [parse_variant("A", "", "demo"), parse_variant("B", "--draft-model demo", "demo")]
    elif args.a is None or args.b is None:
        raise InvalidRequestError('Name both sides, say --a "" --b "--draft-model FOLDER".', param="b")
    else:
        found = [parse_variant("A", args.a, args.model), parse_variant("B", args.b, args.model)]
    check_count(found)
    urls = [variant.url for variant in found if variant.url is not None]
    if len(set(urls)) < len(urls):
        raise InvalidRequestError("Two sides are the same server: the second would find its prompts cached.", param="b")
    return found


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = args.api_key or environment_api_key()
    return {"Authorization": f"Bearer {key}"} if key else {}


def _folder(given: str | None) -> Path:
    """New, or empty: another comparison's runs would be taken for this one's."""
    folder = Path(given or f"specserve-ab-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InvalidRequestError(f"--output {folder} is not empty: name another folder.", param="output")
    except OSError as error:
        raise InvalidRequestError(f"--output {folder} cannot be made: {error.strerror}.", param="output") from error
    return folder


def _numbers(kind: Callable[[str], T], text: str) -> tuple[T, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from error


def _report(outcome: Outcome, folder: Path, slos: Slos | None) -> int:
    """Tell what was found, if anything was, and why there is not more of it."""
    runs = len(outcome.comparison.runs)
    try:
        if runs:
            show(outcome.comparison, folder, slos)
    except KeyboardInterrupt:
        again = f"all was measured; `specserve bench report {folder}` makes its report"
        return _failed(f"interrupted while the report was made: {again}.", EXIT_INTERRUPTED)
    if outcome.stopped is None:
        return 0
    measured = "1 run" if runs == 1 else f"{runs} runs"
    kept = f"what was measured by then ({measured}) is in {folder}" if runs else "nothing was measured"
    print(f"specserve: The comparison did not finish: {outcome.stopped}; {kept}.", file=sys.stderr)
    return EXIT_INTERRUPTED if outcome.interrupted else EXIT_FAILED


def _failed(message: str, status: int) -> int:
    print(f"specserve: {message}", file=sys.stderr)
    return status
