"""What a comparison measures: at which loads, how often, on which requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import msgspec

from specserve.bench.adapter_loads import Ranks, modules_of
from specserve.bench.datasets import Tokens
from specserve.bench.options import TraceOptions, refused
from specserve.bench.records import Load, TracedRequest
from specserve.bench.trace import make_trace
from specserve.bench.turns import WARM_UP, Turn
from specserve.bench.words import load_name

LOADS = (1, 4, 16)  # requests at a time, unless others or rates are asked for
LEAST_REQUESTS = 3  # a run


class AbOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a comparison goes. Each of `concurrency` and each of `rates` is a load of its own, with each of `adapters`
    or of `ranks` if there are any."""

    concurrency: tuple[int, ...] = ()  # requests at a time
    rates: tuple[float, ...] = ()  # requests/s
    adapters: tuple[int, ...] = ()  # how many of --lora-modules are asked for, the first ones; 0: the base model alone
    ranks: tuple[int, ...] = ()  # of those asked for; 0: the base model alone
    rounds: int = 6  # fewer know little of their own spread
    requests: int | None = None  # a run; None: twice the concurrency and some, or `seconds` of a rate
    seconds: float = 10.0  # how long requests come in a run at a rate
    warm_up: int | None = None  # requests of a load's warm-up; None: as many as of a run
    minutes: float | None = None  # no round begins that would end later than so long after the start; None: all do
    one_at_a_time: bool = False  # never two servers at once
    start_timeout: float = 900.0  # s, for a server to answer

    def check(self) -> None:
        """Raise InvalidRequestError naming the first flag that is out of range."""
        for name in ("rounds", "requests", "seconds", "warm_up", "minutes", "start_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise refused(name, f"must be positive, got {value}.")
        for name in ("concurrency", "rates"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise refused(name, f"must hold positive numbers, not {value}.")
        for name in ("adapters", "ranks"):
            if any(value < 0 for value in getattr(self, name)):
                raise refused(name, "must hold no negative numbers.")
        for name in ("concurrency", "rates", "adapters", "ranks"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise refused(name, "must name each load once.")
        if self.adapters and self.ranks:
            raise refused("ranks", "and --adapters are varied one at a time.")
        if self.one_at_a_time and self.minutes is not None:
            raise refused("minutes", "goes with servers that are resident together: leave --one-at-a-time out.")

    def loads(self, *, timed: bool) -> list[Load]:
        """The loads in their order; a dataset that tells when requests come is the only one."""
        if timed and (self.concurrency or self.rates):
            raise refused("concurrency", "and --rates go without a dataset that says when requests come.")
        found: list[Load] = [{"trace": "timed"}] if timed else []
        found += [{"concurrency": number} for number in self.concurrency]
        found += [{"rate": rate} for rate in self.rates]
        used: list[Load] = [{"adapters": number} for number in self.adapters]
        used += [{"rank": rank} for rank in self.ranks]
        return [load | one for load in found or [{"concurrency": number} for number in LOADS] for one in used or [{}]]


class Plan(msgspec.Struct, frozen=True):
    """The loads, and the requests of each one's warm-up and rounds."""

    loads: list[Load]
    rounds: int
    traces: dict[tuple[str, int], list[TracedRequest]]  # by the load's name and the round

    def requests(self, turn: Turn) -> list[TracedRequest]:
        return self.traces[load_name(turn.load), turn.round]


def make_plan(
    options: AbOptions, trace: TraceOptions, tokens: Callable[[], Tokens], ranks: Callable[[], Ranks] = dict
) -> Plan:
    """One seeded trace a load, cut into a warm-up and rounds.

    Every variant is sent the same. No round repeats another's requests, as far as the dataset goes, so that no prefix
    cache answers for a server. `ranks`: of adapters, asked for where ranks are varied. Raises InvalidRequestError.
    """
    options.check()
    loads = options.loads(timed=trace.timed)
    used = [modules_of(load, trace.lora_modules, ranks) for load in loads]
    found: dict[tuple[str, int], list[TracedRequest]] = {}
    for number, load in enumerate(loads):
        count = _requests(options, load)
        sizes = [options.warm_up or count, *[count] * options.rounds]
        asked = msgspec.structs.replace(
            trace,
            num_prompts=sum(sizes),
            seed=trace.seed + number,
            request_rate=_rate(trace, load),
            lora_modules=used[number],
        )
        whole = make_trace(asked, tokens)
        if (options.adapters or options.ranks) and not _as_asked(whole, asked.lora_modules):
            raise refused("dataset_path", "names adapters itself: --adapters and --ranks go without those.")
        if len(whole) <= sum(sizes[:-1]):  # the last round may have fewer
            wanted = f"{options.rounds} and a warm-up take {sum(sizes)} requests"
            raise refused("rounds", f"{wanted}, but the dataset has {len(whole)}.")
        for part, (start, end) in enumerate(pairwise(accumulate(sizes, initial=0)), WARM_UP):
            found[load_name(load), part] = _from_zero(whole[start:end])
    return Plan(loads, options.rounds, found)


def _as_asked(requests: Sequence[TracedRequest], names: Sequence[str]) -> bool:
    known: set[str | None] = set(names) or {None}
    return {request.adapter for request in requests} <= known


def _requests(options: AbOptions, load: Load) -> int:
    if options.requests is not None:
        return options.requests
    if "rate" in load:
        return max(LEAST_REQUESTS, round(float(load["rate"]) * options.seconds))
    return max(LEAST_REQUESTS, 2 * int(load.get("concurrency", 1)) + 1)


def _rate(trace: TraceOptions, load: Load) -> float:
    return float(load["rate"]) if "rate" in load else trace.request_rate


def _from_zero(requests: Sequence[TracedRequest]) -> list[TracedRequest]:
    """A part of a trace as a run of its own: its first request comes at once."""
    start = requests[0].arrival
    return [msgspec.structs.replace(one, arrival=round(one.arrival - start, 6)) for one in requests]
