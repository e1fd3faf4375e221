"""Requests that come while others run: an engine stepped by hand, with the time of every token."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.engine import Row
from benchmarks.engines.specserve import SpecserveEngine
from specserve.core.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Stream:
    """One request: where its adapter lay when it came ("" for the base model), and when its tokens came."""

    adapter: str | None
    tier: str
    added: float
    arrivals: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.added

    def gaps(self, begin: float = -math.inf, end: float = math.inf) -> list[float]:
        """Seconds between tokens, of those that came between these times."""
        return [later - earlier for earlier, later in pairwise(self.arrivals) if begin <= earlier and later <= end]


class Streams:
    """Requests on their way through one engine, by id."""

    def __init__(self, engine: SpecserveEngine) -> None:
        self.engine = engine
        self.live: dict[str, Stream] = {}

    def add(self, prompt: list[int], adapter: str | None, out: int) -> Stream:
        """`out` greedy tokens, end of text ignored. It has come before the engine has looked at it."""
        added = time.perf_counter()
        tier = "" if adapter is None else tier_of(self.engine, adapter)
        params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)
        (request,) = self.engine.requests([prompt], [adapter], params)
        self.engine.core.add_request(request)
        stream = self.live[request.request_id] = Stream(adapter, tier, added)
        return stream

    def step(self) -> list[Stream]:
        """One step of the engine: the requests that it ended."""
        outputs = self.engine.core.step()
        self.engine.core.poll_replies()
        now = time.perf_counter()
        ended = []
        for output in outputs:
            if output.error is not None:
                raise output.error.to_error()
            self.live[output.request_id].arrivals += [now] * len(output.token_ids)
            if output.finish_reason is not None:
                ended.append(self.live.pop(output.request_id))
        return ended

    def drain(self) -> None:
        """Step until nothing runs."""
        while self.engine.core.has_work():
            self.step()

    def abort(self) -> None:
        """End all requests."""
        self.engine.core.abort_requests(list(self.live))
        self.drain()
        self.live.clear()


def tier_of(engine: SpecserveEngine, adapter: str) -> str:
    """ "disk", "host" or "device"."""
    return engine.core.adapters.info(adapter).tier


def forget(engine: SpecserveEngine, adapter: str) -> None:
    """Back to the disk: its slot and its host memory are given up."""
    path = engine.core.adapters.info(adapter).path
    engine.core.adapters.unload(adapter)
    engine.core.adapters.register(adapter, path)


def run_closed(
    engine: SpecserveEngine, prompts: Sequence[list[int]], adapters: Sequence[str | None], out: int, streams: int
) -> list[Stream]:
    """All of these requests in order, `streams` of them at a time: as one ends the next begins. In their order."""
    own = Streams(engine)
    ended: list[Stream] = []
    waiting = deque(zip(prompts, adapters, strict=True))
    while waiting or own.live:
        while waiting and len(own.live) < streams:
            own.add(*waiting.popleft(), out)
        ended += own.step()
    own.drain()
    return sorted(ended, key=lambda stream: stream.added)


def random_prompts(count: int, tokens: int, vocab: int, seed: int | None = None) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(tokens)] for _ in range(count)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def latencies(name: str, values: Sequence[float], percents: Sequence[float] = (50, 99)) -> Row:
    """`name_mean_ms`, `name_p50_ms` and so on, of seconds; None of none."""
    if not values:
        return {f"{name}_{what}_ms": None for what in ("mean", *(f"p{percent:g}" for percent in percents))}
    found = {"mean": sum(values) / len(values)} | {f"p{percent:g}": percentile(values, percent) for percent in percents}
    return {f"{name}_{what}_ms": round(value * 1e3, 3) for what, value in found.items()}
