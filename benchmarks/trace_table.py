"""Where a step's time goes on the device, from a trace of torch.profiler.

The device's timeline is what kernels, copies and fills cover between the first one's start and the last one's end; what
none covers is idle. Kernels of one graph replay share a correlation, so idle time falls into two kinds: inside a
replay, between its kernels, and outside of any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "fill"}
NAME_WIDTH = 72


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that ran on the device; µs. `launch` is the correlation of the call that started it."""

    name: str
    kind: str
    start: float
    duration: float
    launch: int

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True, slots=True)
class Timeline:
    """µs a step: `step` = busy + idle_inside + idle_outside; `between` is from a replay's end to the next one's start,
    whatever runs there (None without replays)."""

    step: float
    busy: float
    idle_inside: float
    idle_outside: float
    between: float | None
    replays: float  # a step


def device_events(trace: Mapping[str, Any]) -> list[DeviceEvent]:
    """The device's events of a chrome trace, by start."""
    found = [
        DeviceEvent(
            event["name"], KINDS[event["cat"]], event["ts"], event["dur"], event.get("args", {}).get("correlation", 0)
        )
        for event in trace["traceEvents"]
        if event.get("cat") in KINDS and event.get("ph") == "X"
    ]
    return sorted(found, key=lambda event: event.start)


def replays(events: Iterable[DeviceEvent]) -> list[tuple[float, float]]:
    """(start, end) of each graph replay, by start: a call that started more than one event."""
    by_launch: dict[int, list[DeviceEvent]] = defaultdict(list)
    for event in events:
        by_launch[event.launch].append(event)
    many = [group for launch, group in by_launch.items() if launch and len(group) > 1]
    return sorted((group[0].start, max(event.end for event in group)) for group in many)


def gaps(events: Sequence[DeviceEvent]) -> list[tuple[float, float]]:
    """Idle intervals between events sorted by start; streams may overlap."""
    found = []
    end = events[0].end if events else 0.0
    for event in events:
        if event.start > end:
            found.append((end, event.start))
        end = max(end, event.end)
    return found


def timeline(events: Sequence[DeviceEvent], steps: int) -> Timeline:
    """The timeline of `steps` steps."""
    if not events:
        raise ValueError("The trace has no device events.")
    span = max(event.end for event in events) - events[0].start
    runs = replays(events)
    inside = outside = 0.0
    for start, end in gaps(events):
        if any(first <= start and end <= last for first, last in runs):
            inside += end - start
        else:
            outside += end - start
    between = sum(max(0.0, after[0] - before[1]) for before, after in pairwise(runs))
    return Timeline(
        step=span / steps, busy=(span - inside - outside) / steps, idle_inside=inside / steps,
        idle_outside=outside / steps, between=between / steps if runs else None, replays=len(runs) / steps,
    )  # fmt: skip


def by_name(events: Iterable[DeviceEvent], steps: int) -> list[tuple[str, str, float, float]]:
    """(name, kind, µs a step, launches a step), the costliest first."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        entry = total[event.name, event.kind]
        entry[0] += event.duration / steps
        entry[1] += 1 / steps
    ranked = sorted(total.items(), key=lambda item: -item[1][0])
    return [(name, kind, time, count) for (name, kind), (time, count) in ranked]


def table(events: Sequence[DeviceEvent], steps: int, rows: int = 40) -> str:
    """Both for people."""
    line = timeline(events, steps)
    summed = sum(event.duration for event in events) / steps
    out = [f"{'µs/step':>9} {'share':>6} {'launches':>8} {'µs each':>8}  name"]
    for name, kind, time, count in by_name(events, steps)[:rows]:
        label = name if kind == "kernel" else f"[{kind}] {name}"
        out.append(f"{time:9.1f} {time / line.step:6.1%} {count:8.1f} {time / count:8.2f}  {label[:NAME_WIDTH]}")
    out.append(f"{line.step:9.1f} a step; {summed:.1f} summed over events, {line.busy:.1f} covered by them")
    notes = [
        (f"idle inside graph replays ({line.replays:.1f} a step)", line.idle_inside),
        ("idle outside graph replays", line.idle_outside),
    ]
    if line.between is not None:
        notes.append(("from a replay's end to the next one's start, whatever runs there", line.between))
    out += [f"{time:9.1f} {time / line.step:6.1%} {what}" for what, time in notes]
    return "\n".join(out)
