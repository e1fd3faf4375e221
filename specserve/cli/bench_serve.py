"""`specserve bench serve`: load on a running server, with the flags and figures of `vllm bench serve`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from specserve.bench.facts import append_line, check_writable, surroundings
from specserve.bench.metrics import LATENCIES, PERCENTILES, summarise
from specserve.bench.metrics_text import text
from specserve.bench.options import TraceOptions
from specserve.bench.records import Comparison, RequestRecord, RunRecord
from specserve.bench.serve import SERVE_HELP, Prepared, ServeOptions, measure, prepare
from specserve.cli.bench_flags import add_goodput, add_trace_flags, slos_of, trace_options
from specserve.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED
from specserve.cli.flags import add_flags, from_flags
from specserve.config import environment_api_key
from specserve.core.errors import SpecserveError

BAR = "{desc} {n_fmt}/{total_fmt} requests |{bar:20}| {elapsed}{postfix}"
MAX_ERRORS = 5  # different ones, shown at the end


def add_serve(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "send requests to a running server and tell latencies, throughput and acceptance"
    parser = actions.add_parser(
        "serve",
        help=text,
        description=text[0].upper()
        + text[1:]
        + ": specserve's, or any with OpenAI's API (vLLM, SGLang, TGI, …). Flags "
        "and figures are those of `vllm bench serve` where they mean the same.",
    )
    group = parser.add_argument_group("server and run")
    add_flags(group, ServeOptions, SERVE_HELP)
    add_goodput(group)
    group.add_argument(
        "--metric-percentiles", type=_percentiles, default=PERCENTILES, metavar="P,P…",
        help="of times, beside mean and median [90,99]",
    )  # fmt: skip
    group.add_argument(
        "--percentile-metrics", type=_latencies, default=LATENCIES, metavar="NAME,NAME…",
        help="the times that are told [ttft,tpot,itl,e2el]",
    )  # fmt: skip
    group.add_argument(
        "--metadata", type=_metadata, nargs="+", default=[], metavar="KEY=VALUE", help="saved with the result"
    )
    group.add_argument("--disable-tqdm", action="store_true", help="show no bar")
    add_trace_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 if the server died or no request succeeded, 2 if asked for what cannot be, 130 if
    interrupted. What was measured by then is printed and saved all the same."""
    options = from_flags(ServeOptions, args)
    options = msgspec.structs.replace(options, api_key=options.api_key or environment_api_key())
    asked = trace_options(args)
    try:
        slos = slos_of(args)
        prepared, record, interrupted = asyncio.run(_measure(options, asked, bar=not args.disable_tqdm))
    except SpecserveError as error:
        print(f"specserve: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:  # before the first request, or the second one
        print("specserve: interrupted; nothing is told of what was measured.", file=sys.stderr)
        return EXIT_INTERRUPTED
    summary = summarise([record], slos, args.metric_percentiles)
    untold = {name: None for name in LATENCIES if name not in args.percentile_metrics}
    summary = msgspec.structs.replace(summary, **untold)
    print(text(summary))
    _tell_failures(prepared, record, interrupted)
    path = result_path(options, asked, prepared)
    if path is not None:
        facts = {"metrics": summary.flat()} | ({"metadata": dict(args.metadata)} if args.metadata else {})
        append_line(path, _result(options, asked, prepared, record, facts))
        print(f"Added to {path}.")
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if record.complete and summary.completed else EXIT_FAILED


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < one < 100 for one in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers between 0 and 100 with commas between")
    return found


def _latencies(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(LATENCIES):
        raise argparse.ArgumentTypeError(f"{text!r} is not of {','.join(LATENCIES)}")
    return found


def _metadata(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, value


async def _measure(options: ServeOptions, asked: TraceOptions, *, bar: bool) -> tuple[Prepared, RunRecord, bool]:
    """What was sent, what came of it, and whether a Ctrl-C ended it."""
    prepared = await prepare(options, asked)
    path = result_path(options, asked, prepared)
    if path is not None:
        check_writable(path, "result_filename")
    stop = asyncio.Event()
    with _until_interrupted(stop) as was_interrupted, _bar(len(prepared.trace), shown=bar) as on_end:
        record = await measure(prepared, options, asked, on_end, stop)
        return prepared, record, was_interrupted()


@contextlib.contextmanager
def _until_interrupted(stop: asyncio.Event) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C sets `stop`, so that what was measured is told; a second one ends the process as usual."""
    loop, interrupts = asyncio.get_running_loop(), 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread, or no Unix
        loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield lambda: interrupts > 0
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar on a terminal; what is yielded takes each record as it comes."""
    failed = 0
    # disable=None: shown on a terminal alone.
    with tqdm(desc="Measuring", total=total, bar_format=BAR, disable=None if shown else True, leave=False) as bar:

        def on_end(record: RequestRecord) -> None:
            nonlocal failed
            if record.error is not None:
                failed += 1
                bar.set_postfix_str(f"{failed} failed", refresh=False)
            bar.update()

        yield on_end


def _tell_failures(prepared: Prepared, record: RunRecord, interrupted: bool) -> None:
    errors: dict[str, int] = {}
    for request in record.requests:
        if request.error is not None:
            errors[request.error] = errors.get(request.error, 0) + 1
    for error, count in sorted(errors.items(), key=lambda item: -item[1])[:MAX_ERRORS]:
        print(f"specserve: {count} of {len(prepared.trace)} requests failed: {error}", file=sys.stderr)
    if not record.complete:
        why = "interrupted" if interrupted else f"the server at {prepared.target.url} takes no connections any more"
        ended = f"{len(record.requests)} of {len(prepared.trace)} requests had ended; the figures are theirs"
        print(f"specserve: {why}. {ended}.", file=sys.stderr)


def result_path(options: ServeOptions, asked: TraceOptions, prepared: Prepared) -> Path | None:
    """As named; else LABEL-RATEqps[-concurrencyN]-MODEL.jsonl. None: nothing is to be saved."""
    if not options.save_result and options.result_filename is None:
        return None
    folder = Path(options.result_dir or ".")
    if options.result_filename is not None:
        return folder / options.result_filename
    limit = f"-concurrency{options.max_concurrency}" if options.max_concurrency is not None else ""
    label = options.label or prepared.target.engine
    name = f"{label}-{asked.request_rate:g}qps{limit}-{prepared.target.model}"
    return folder / (re.sub(r"[^\w.\-]+", "_", name) + ".jsonl")


def _result(
    options: ServeOptions, asked: TraceOptions, prepared: Prepared, record: RunRecord, more: dict[str, Any]
) -> Comparison:
    """The file's line: a comparison of one variant, which reports read, with its figures among the facts."""
    label = options.label or prepared.target.engine
    told = record if options.save_detailed else msgspec.structs.replace(record, requests=[])
    facts = surroundings() | {"trace": asked} | more
    info = msgspec.structs.replace(prepared.info, variant=label, title=label)
    return Comparison([info], [msgspec.structs.replace(told, variant=label)], facts)
