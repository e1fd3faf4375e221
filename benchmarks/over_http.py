"""What remains of the engine's speed over HTTP: the same requests in this process's engine, and streamed by a server.

    python -m benchmarks.over_http --batches 1,8,32 --drafts 0,4 --rounds 5

Both engines stay resident and take turns, first one and then the other, `rounds` times. Of each turn counts the time in
which all requests decode, from the last one's first token to the first one's end:

    rate = tokens that came in that time / that time
    kept = median over rounds of (rate over HTTP / rate in process)

In process, tokens are counted as the engine gives them: what makes text of them there costs it nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import msgspec
import torch

from benchmarks.over_http_client import Arrivals, work
from benchmarks.record import append, surroundings
from benchmarks.streaming_server import served
from specserve.config import EngineConfig, resolve_paths
from specserve.core.messages import AddRequest
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.engine.client.launch import ENGINE_CORE
from specserve.engine.core.core import EngineCore, make_core

Prompts = list[list[int]]


def steady_rate(streams: list[Arrivals]) -> float:
    """Tokens a second while all streams run; raises ValueError where there is no such time."""
    begin = max(arrivals[0][0] for arrivals in streams)
    end = min(arrivals[-1][0] for arrivals in streams)
    if end <= begin:
        raise ValueError("No moment at which all requests decoded: ask for more new tokens.")
    tokens = sum(count for arrivals in streams for at, count in arrivals if begin < at <= end)
    return tokens / (end - begin)


def in_process(engine: EngineCore, prompts: Prompts, new: int, drafts: int | None) -> list[Arrivals]:
    """Each request's tokens as the engine gives them."""
    params = SamplingParams(
        max_tokens=new, temperature=0.0, ignore_eos=True, speculation=SpeculationParams(num_draft_tokens=drafts)
    )
    for number, prompt in enumerate(prompts):
        engine.add_request(AddRequest(request_id=str(number), prompt_ids=prompt, params=params, seed=0))
    arrivals: list[Arrivals] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise output.error.to_error()
            arrivals[int(output.request_id)].append((time.monotonic(), len(output.token_ids)))
    return arrivals


def over_http(pipes: list[Connection], url: str, prompts: Prompts, new: int, drafts: int | None) -> list[Arrivals]:
    """The same, as client processes get them."""
    speculation = {} if drafts is None else {"speculation": {"num_draft_tokens": drafts}}
    bodies = [
        {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, **speculation} for prompt in prompts
    ]
    used = pipes[: len(bodies)]
    for number, pipe in enumerate(used):
        pipe.send((url, bodies[number :: len(used)]))
    return [arrivals for pipe in used for arrivals in pipe.recv()]


@contextlib.contextmanager
def clients(count: int) -> Iterator[list[Connection]]:
    """Client processes; forked before an engine has threads."""
    context = multiprocessing.get_context("fork")
    pipes = []
    for _ in range(count):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs,), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    yield pipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--drafts", default="0", help="numbers of drafts, or auto, with commas between")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=192, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--options", default="{}", help="JSON with fields of EngineConfig, for both engines")
    parser.add_argument("--out", type=Path, help="JSON lines to append the rows to")
    args = parser.parse_args()
    options = {"model": args.model, **json.loads(args.options)}
    with clients(args.clients) as pipes, served(options, ENGINE_CORE) as (url, _):
        engine = make_core(resolve_paths(msgspec.convert(options, EngineConfig)))
        facts = surroundings("cuda" if torch.cuda.is_available() else "cpu")
        for drafts in args.drafts.split(","):
            for batch in map(int, args.batches.split(",")):
                row = _compare(engine, pipes, url, args, batch, None if drafts == "auto" else int(drafts))
                row = {"benchmark": "over_http", **options, **row, **facts}
                print(json.dumps(row), flush=True)
                if args.out:
                    append(args.out, row)
        engine.close()


def _compare(
    engine: EngineCore, pipes: list[Connection], url: str, args: argparse.Namespace, batch: int, drafts: int | None
) -> dict[str, object]:
    """One row; the first round warms up and does not count."""
    rng = random.Random(batch)
    rates: list[tuple[float, float]] = []
    for number in range(args.rounds + 1):
        prompts = [[rng.randrange(engine.built.spec.vocab_size) for _ in range(args.prompt)] for _ in range(batch)]
        pair = {}
        for side in ("process", "http")[:: 1 if number % 2 else -1]:
            if side == "process":
                pair[side] = steady_rate(in_process(engine, prompts, args.new, drafts))
            else:
                pair[side] = steady_rate(over_http(pipes, url, prompts, args.new, drafts))
        rates.append((pair["process"], pair["http"]))
    counted = rates[1:]
    kept = sorted(http / process for process, http in counted)
    return {
        "batch": batch, "drafts": "auto" if drafts is None else drafts, "prompt": args.prompt, "new": args.new,
        "rounds": args.rounds, "tok_s_process": round(median(process for process, _ in counted), 1),
        "tok_s_http": round(median(http for _, http in counted), 1), "kept": round(median(kept), 4),
        "kept_low": round(kept[0], 4), "kept_high": round(kept[-1], 4),
    }  # fmt: skip


if __name__ == "__main__":
    main()
