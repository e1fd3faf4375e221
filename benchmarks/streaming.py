"""What streaming costs: tokens and events per second through the API process, over an engine that costs nothing.

    python -m benchmarks.streaming --streams 128 --tokens 2 --step-ms 4 --clients 4 --seconds 10

The server is the real one, in its own process, over a core without a model (streaming_core.py); client processes read
the streams. One JSON line says what came through, how much of the engine's pace that is (`kept`), and the API process's
own time on a CPU: its share of one core, and microseconds an event. Steps that wait for a stream share an event, so
with `--step-ms 0`, where the engine is as fast as it is read, there are many tokens an event.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.record import append, commit, machine
from benchmarks.streaming_client import Counts, Load, run
from benchmarks.streaming_server import served

CORE = "benchmarks.streaming_core:PacedCore"
SETTLE_SECONDS = 0.5  # from the last stream's first event to the first that counts


@dataclass(frozen=True, slots=True)
class Setting:
    """`tokens` a step for each of `streams`, a step every `step_ms`; read by `clients` processes for `seconds`."""

    streams: int
    tokens: int
    step_ms: float
    clients: int
    seconds: float
    chat: bool
    model: str


def measure(setting: Setting) -> dict[str, object]:
    """One run's row."""
    engine = {"model": setting.model, "max_num_seqs": max(setting.streams, 256)}
    pace = {"STREAMING_TOKENS": str(setting.tokens), "STREAMING_STEP_MS": str(setting.step_ms)}
    with served(engine, CORE, **pace) as (url, pid), _clients(setting, url) as pipes:
        for pipe in pipes:
            pipe.recv()
        start = time.monotonic() + SETTLE_SECONDS
        for pipe in pipes:
            pipe.send((start, start + setting.seconds))
        time.sleep(SETTLE_SECONDS)
        before = _cpu_seconds(pid)
        time.sleep(setting.seconds)
        busy = _cpu_seconds(pid) - before
        counts: list[Counts] = [pipe.recv() for pipe in pipes]
    events, tokens = sum(count.events for count in counts), sum(count.tokens for count in counts)
    most = setting.streams * setting.tokens / setting.step_ms * 1000.0 if setting.step_ms else None
    return {
        **asdict(setting),
        "tokens_per_s": round(tokens / setting.seconds), "events_per_s": round(events / setting.seconds),
        "tokens_per_event": round(tokens / max(events, 1), 3),
        "bytes_per_event": round(sum(count.num_bytes for count in counts) / max(events, 1), 1),
        "kept": round(tokens / setting.seconds / most, 4) if most else None,
        "api_cpu": round(busy / setting.seconds, 3), "api_us_per_event": round(busy / max(events, 1) * 1e6, 2),
        "api_us_per_token": round(busy / max(tokens, 1) * 1e6, 2),
    }  # fmt: skip


@contextlib.contextmanager
def _clients(setting: Setting, url: str) -> Iterator[list[Connection]]:
    """The client processes' pipes, their streams asked for."""
    context = multiprocessing.get_context("fork")  # spawned ones would import all of this again
    processes, pipes = [], []
    for number in range(setting.clients):
        streams = len(range(number, setting.streams, setting.clients))
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(Load(url, streams, setting.chat), theirs), daemon=True)
        process.start()
        theirs.close()  # so that a client's death shows as the end of its pipe
        processes.append(process)
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _cpu_seconds(pid: int) -> float:
    """User and system time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2, help="a step and stream")
    parser.add_argument("--step-ms", type=float, default=0.0, help="0: as fast as the API process reads")
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    parser.add_argument("--model", default="demo", help="whose tokenizer is used")
    parser.add_argument("--out", type=Path, help="JSON lines to append the row to")
    args = parser.parse_args()
    setting = Setting(args.streams, args.tokens, args.step_ms, args.clients, args.seconds, args.chat, args.model)
    row = {"benchmark": "streaming", **measure(setting), "commit": commit(), "machine": machine()}
    print(json.dumps(row), flush=True)
    if args.out:
        append(args.out, row)


if __name__ == "__main__":
    main()
