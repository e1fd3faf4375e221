"""A thousand adapters on few slots: what does it cost that most of them are elsewhere?

One seeded trace, the same for all rows: each request names an adapter by Zipf's law, all prompts and answers are of
one length, and `streams` requests run at a time: as one ends the next begins. It runs with

- `resident`: a slot for every adapter that the trace names, all of them there before it begins;
- `host`: few slots, and a host tier that holds them all (those that the trace names), and has read them;
- `quarter`: few slots, and a host tier of a quarter of all adapters' bytes.

Before it, an earlier trace of the same law and length has left its traces in slots and host memory. Folders that are
read lie in the page cache. tokens/s are the answers', from the first request to the last token.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.adapter_mixes import zipf
from benchmarks.adapter_setup import Adapters, Bench, table, verdict
from benchmarks.adapter_streams import Stream, latencies, random_prompts, run_closed
from benchmarks.engine import Row
from benchmarks.engines.specserve import SpecserveEngine
from specserve.core.messages import AdapterTierStats

RANKS = (4, 5, 6, 7, 8)
QUARTER = 0.25
SEED = 7
COUNTERS = ("reads", "loads", "evictions_host", "evictions_device")
TWIN_BATCH = 64


@dataclass(frozen=True)
class Trace:
    """Sizes of the run: `requests` over `names` adapters, `streams` at a time, on `slots`."""

    names: int
    requests: int
    streams: int
    slots: int
    s: float
    inp: int
    out: int

    @property
    def adapters(self) -> Adapters:
        return Adapters("thousand", tuple(RANKS[number % len(RANKS)] for number in range(self.names)))

    @cached_property
    def numbers(self) -> list[int]:
        """Each request's adapter; 0 is the most popular."""
        return zipf(self.requests, self.names, self.s, random.Random(SEED))

    @cached_property
    def named(self) -> frozenset[int]:
        """Adapters that it names."""
        return frozenset(self.numbers)

    def warm(self, *, all_named: bool) -> list[int]:
        """What is used before it, in this order: the adapters of an earlier trace, each at its last use. `all_named`:
        those that this trace names and the earlier one did not, then those that both name."""
        before = zipf(self.requests, self.names, self.s, random.Random(SEED + 1))
        earlier = list(dict.fromkeys(reversed(before)))[::-1]
        if not all_named:
            return earlier
        return sorted(self.named.difference(earlier)) + [number for number in earlier if number in self.named]


def measure_thousand(bench: Bench, trace: Trace) -> list[Row]:
    """The three rows. They carry what the twin says of an engine with too few slots and too little memory."""
    twin = _check(bench, trace)
    resident = max(trace.slots, len(trace.named))
    few, all_named = trace.slots, len(trace.named) / trace.names
    rows: list[Row] = []
    for kind, slots, share in (("resident", resident, all_named), ("host", few, all_named), ("quarter", few, QUARTER)):
        warm = trace.warm(all_named=kind != "quarter")
        engine = bench.open(trace.adapters, slots, share, max_rows=trace.streams)
        try:
            row = {
                "section": "thousand",
                "kind": kind,
                "slots": slots,
                "host_share": round(share, 3),
                **trace.adapters.facts,
            }
            row |= _run(engine, bench, trace, warm)
        finally:
            engine.close()
            del engine
        row |= {"of_resident": round(row["tok_s"] / rows[0]["tok_s"], 4) if rows else 1.0, "twin": twin}
        rows.append(row)
        bench.emit(row)
    return rows


def _run(engine: SpecserveEngine, bench: Bench, trace: Trace, warm: Sequence[int]) -> Row:
    """Warm up, then run the trace."""
    vocab = bench.work.vocab
    begin = time.perf_counter()
    names = [f"a{number}" for number in warm]
    run_closed(engine, random_prompts(len(names), 8, vocab), names, 1, trace.streams)
    run_closed(engine, random_prompts(trace.streams, trace.inp, vocab), names[-1:] * trace.streams, 8, trace.streams)
    warmed = time.perf_counter() - begin
    before = tier_stats(engine)
    prompts = random_prompts(trace.requests, trace.inp, vocab, SEED)
    begin = time.perf_counter()
    streams = run_closed(engine, prompts, [f"a{number}" for number in trace.numbers], trace.out, trace.streams)
    taken = max(stream.arrivals[-1] for stream in streams) - begin
    after = tier_stats(engine)
    later = streams[trace.streams :]  # the first ones come all at once, and wait for one another
    return {
        "requests": trace.requests, "streams": trace.streams, "zipf": trace.s, "inp": trace.inp, "out": trace.out,
        "named": len(trace.named), "warm_up_s": round(warmed, 1), "seconds": round(taken, 2),
        "tok_s": round(sum(len(stream.arrivals) for stream in streams) / taken, 1), **_hits(streams),
        **{counter: getattr(after, counter) - getattr(before, counter) for counter in COUNTERS},
        "host_bytes": after.host_bytes, "max_host_bytes": after.max_host_bytes,
        **latencies("ttft", [stream.first_token for stream in later]),
        **latencies("itl", [gap for stream in later for gap in stream.gaps()]),
    }  # fmt: skip


def _hits(streams: Sequence[Stream]) -> Row:
    """Where requests found their adapters when they came, as shares."""
    tiers = Counter(stream.tier for stream in streams)
    return {f"found_{tier}": round(tiers[tier] / len(streams), 4) for tier in ("device", "host", "disk")}


def tier_stats(engine: SpecserveEngine) -> AdapterTierStats:
    return engine.core.stats().adapter_tiers


def _check(bench: Bench, trace: Trace) -> Row | None:
    """On the twin: a batch of distinct adapters, four times as many as there are slots and host memory for."""
    count = min(TWIN_BATCH, trace.names // 2 * 2)
    adapters = Adapters("few", trace.adapters.ranks[:count])
    cells = {"churn": [f"a{number}" for number in range(count)]}
    return bench.check(adapters, max(2, count // 4), cells, QUARTER).get("churn")


def thousand_table(rows: Sequence[Row]) -> str:
    head = (
        "adapters", "slots", "tokens/s", "of resident", "device hits", "host hits", "disk", "reads", "loads",
        "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "twin",
    )  # fmt: skip
    cells = [
        (
            row["kind"], row["slots"], row["tok_s"], row["of_resident"], row["found_device"], row["found_host"],
            row["found_disk"], row["reads"], row["loads"], row["ttft_p50_ms"], row["ttft_p99_ms"], row["itl_p50_ms"],
            row["itl_p99_ms"], verdict(row["twin"]),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells)
