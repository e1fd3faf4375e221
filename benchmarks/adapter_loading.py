"""Does anybody notice that an adapter is loaded? Those who decode meanwhile, and the one who waits for it.

While `streams` requests decode on adapters in slots, others arrive one every so often, each on an adapter of its own:
`none` do, or they find it in a slot (`warm`), or it must be read from its folder first (`cold`). Their prompts lengthen
steps too, so that cold ones are compared with warm ones: the same requests at the same times. What is reported are the
streams' times between tokens, as they leave the engine, from the first arrival's time to the end of the last one.

Alone on an engine, a request's time to its first token tells what it waits for: its adapter is in a slot (`device`), in
the host tier (`host`), or in its folder (`disk`; `disk, scaled` where alpha is not the rank, so that B must be computed
anew). Tiers take turns. The files lie in the page cache: what a disk would add is not in these figures.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.adapter_setup import Adapters, Bench, table
from benchmarks.adapter_streams import (
    Stream,
    Streams,
    forget,
    latencies,
    percentile,
    random_prompts,
    run_closed,
    tier_of,
)
from benchmarks.engine import Row
from benchmarks.engines.specserve import SpecserveEngine

RANK = 16
KINDS = ("none", "warm", "cold")
ARRIVING_TOKENS, ARRIVING_OUT = 64, 8  # of the requests that arrive
PERCENTS = (50, 99, 99.9, 100)
ROUNDS = 20  # of first tokens
TIERS = ("device", "host", "disk", "disk, scaled")
HOST_CYCLE = 5  # adapters that take turns in two slots
FILES_ARE = "in the page cache"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One every `every` seconds for `seconds`, beside each of these numbers of streams."""

    streams: tuple[int, ...]
    seconds: float
    every: float

    @property
    def count(self) -> int:
        return max(1, round(self.seconds / self.every))


def measure_loading(bench: Bench, arrivals: Arrivals) -> list[Row]:
    """Rows of the streams that are disturbed, then of first tokens."""
    return _measure_disturbed(bench, arrivals) + _measure_first_tokens(bench)


def _measure_disturbed(bench: Bench, arrivals: Arrivals) -> list[Row]:
    most = max(arrivals.streams)
    adapters = Adapters("loading", (RANK,) * (most + arrivals.count))
    cold = [f"a{most + number}" for number in range(arrivals.count)]
    slots = len(adapters.ranks)
    engine = bench.open(adapters, slots, max_rows=64)
    rows: list[Row] = []
    try:
        _touch(engine, bench, [f"a{number}" for number in range(most)])
        for count in arrivals.streams:
            warm_p99 = 0.0
            for kind in KINDS:
                _place(engine, bench, cold, kind)
                window, late, began = _disturb(engine, bench, count, cold if kind != "none" else [], arrivals)
                gaps = [gap for stream in window for gap in stream.gaps(*began)]
                row: Row = {
                    "section": "loading", "kind": kind, "streams": count, "slots": slots, **adapters.facts,
                    "arrivals": len(late), "every_s": arrivals.every, "inp": ARRIVING_TOKENS, "out": ARRIVING_OUT,
                    "tiers": dict(Counter(stream.tier for stream in late)), "files": FILES_ARE, "gaps": len(gaps),
                    **latencies("itl", gaps, PERCENTS), **latencies("ttft", [s.first_token for s in late]),
                }  # fmt: skip
                if kind == "warm":
                    warm_p99 = percentile(gaps, 99)
                if kind == "cold":
                    row["p99_of_warm"] = round(percentile(gaps, 99) / warm_p99, 4)
                rows.append(row)
                bench.emit(row)
    finally:
        engine.close()
    return rows


def _disturb(
    engine: SpecserveEngine, bench: Bench, count: int, arriving: Sequence[str], arrivals: Arrivals
) -> tuple[list[Stream], list[Stream], tuple[float, float]]:
    """The streams, those that arrived, and from when to when they were watched."""
    streams, vocab = Streams(engine), bench.work.vocab
    out = engine.core.ready.max_model_len - bench.inp - 1
    decoding = [
        streams.add(prompt, f"a{number}", out) for number, prompt in enumerate(random_prompts(count, bench.inp, vocab))
    ]
    while not all(stream.arrivals for stream in decoding):
        streams.step()
    prompts = random_prompts(len(arriving), ARRIVING_TOKENS, vocab, seed=0)
    begin = time.perf_counter()
    late: list[Stream] = []
    while (
        (now := time.perf_counter()) - begin < arrivals.seconds
        or len(late) < len(arriving)
        or len(streams.live) > count
    ):
        if len(late) < len(arriving) and now - begin >= len(late) * arrivals.every:
            late.append(streams.add(prompts[len(late)], arriving[len(late)], ARRIVING_OUT))
        if any(ended in decoding for ended in streams.step()):
            raise RuntimeError("A stream ended while it was watched: fewer seconds, please.")
    streams.abort()
    return decoding, late, (begin, now)


def _touch(engine: SpecserveEngine, bench: Bench, adapters: Sequence[str]) -> None:
    """One request on each: what there is room for comes to the device, the last ones surely."""
    prompts = random_prompts(len(adapters), 8, bench.work.vocab)
    run_closed(engine, prompts, adapters, 1, streams=8)


def _place(engine: SpecserveEngine, bench: Bench, adapters: Sequence[str], kind: str) -> None:
    """Into slots, or back to their folders."""
    if kind == "warm":
        _touch(engine, bench, adapters)
    else:
        for name in adapters:
            forget(engine, name)


def _measure_first_tokens(bench: Bench) -> list[Row]:
    """Two slots: a0's, and those of the others push it out."""
    adapters = Adapters("first-tokens", (RANK,) * (HOST_CYCLE + 3))
    disk, scaled = f"a{HOST_CYCLE + 1}", f"a{HOST_CYCLE + 2}"
    bench.setup(bench.pair, adapters, slots=2)  # they are written
    _double_alpha(bench, adapters, scaled)
    engine = bench.open(adapters, slots=2, max_rows=16)
    taken: dict[str, list[float]] = {tier: [] for tier in TIERS}
    try:
        _touch(engine, bench, [f"a{number}" for number in range(HOST_CYCLE + 3)])
        for number in range(ROUNDS):
            _touch(engine, bench, ["a0"])
            forget(engine, disk)
            forget(engine, scaled)
            names = ("a0", f"a{1 + number % HOST_CYCLE}", disk, scaled)
            for tier, name in zip(TIERS, names, strict=True):
                assert tier_of(engine, name) == tier.split(",")[0], (tier, name, tier_of(engine, name))
                (prompt,) = random_prompts(1, ARRIVING_TOKENS, bench.work.vocab)
                (stream,) = run_closed(engine, [prompt], [name], 1, streams=1)
                taken[tier].append(stream.first_token)
    finally:
        engine.close()
    rows = []
    warm = percentile(taken["device"], 50)
    for tier, seconds in taken.items():
        row: Row = {
            "section": "loading", "kind": "first token", "tier": tier, "slots": 2, **adapters.facts, "files": FILES_ARE,
            "inp": ARRIVING_TOKENS, "rounds": ROUNDS, **latencies("ttft", seconds, (50, 100)),
            "over_device_ms": round((percentile(seconds, 50) - warm) * 1e3, 3),
        }  # fmt: skip
        rows.append(row)
        bench.emit(row)
    return rows


def _double_alpha(bench: Bench, adapters: Adapters, name: str) -> None:
    """alpha = 2 · rank, as most adapters are trained."""
    config = bench.pair / adapters.name / name / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"lora_alpha": 2 * RANK}))


def loading_table(rows: Sequence[Row]) -> str:
    disturbed = [row for row in rows if "streams" in row]
    head = (
        "arriving adapters", "streams", "arrivals", "ITL mean ms", "p50", "p99", "p99.9", "most", "p99 of warm",
        "TTFT p50 ms",
    )  # fmt: skip
    cells = [
        (
            row["kind"], row["streams"], row["arrivals"], row["itl_mean_ms"], row["itl_p50_ms"], row["itl_p99_ms"],
            row["itl_p99.9_ms"], row["itl_p100_ms"], row.get("p99_of_warm", "-"), row["ttft_p50_ms"],
        )
        for row in disturbed
    ]  # fmt: skip
    firsts = [
        (row["tier"], row["ttft_p50_ms"], row["ttft_p100_ms"], row["over_device_ms"])
        for row in rows
        if row["kind"] == "first token"
    ]
    first_head = ("first token, adapter in", "median ms", "most ms", "over device")
    return table(head, cells) + "\n\n" + table(first_head, firsts)
