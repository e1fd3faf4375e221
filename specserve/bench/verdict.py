"""The outcome in words: who wins where and by how much, in one sentence, and what to keep in mind about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from specserve.bench.break_even import BreakEven
from specserve.bench.compare import AtLoad, Compared
from specserve.bench.metrics import Summary
from specserve.bench.stats import Ratio
from specserve.bench.words import LISTED, load_name, load_names, number

Outcome = Literal["faster", "slower", "no difference", "too few"]
TELLING = 1.2  # bounds around 1 that are further apart than this factor hide what would be worth knowing
ITL = "ITL: from one event of a stream to the next, which brings several tokens where drafts are accepted."
LONGER = 1.02  # answers whose lengths differ by more make times hard to compare


def outcome(ratio: Ratio | None) -> Outcome:
    """Of B; "no difference" only where one worth having would have been found."""
    bounds = None if ratio is None else ratio.bounds
    if bounds is None:
        return "too few"
    low, high = bounds
    if low > 1 or high < 1:
        return "faster" if low > 1 else "slower"
    return "no difference" if high <= low * TELLING else "too few"


def verdict(compared: Compared) -> str:
    """One sentence."""
    a, b, loads = compared.a.variant, compared.b.variant, compared.loads
    if not any(at.pairs for at in loads):
        return f"Nothing to compare: no request was answered by both {a} and {b}."
    groups: dict[Outcome, list[AtLoad]] = {}
    for at in loads:
        groups.setdefault(outcome(at.headline), []).append(at)
    if len(compared.varied) > 1:
        return _counted(compared, groups)
    said = []
    if "faster" in groups:
        said.append(f"{b} is {_speedups(groups['faster'], compared, f' as fast as {a}')}")
    if "slower" in groups:
        said.append(f"{b} is slower than {a}: {_speedups(groups['slower'], compared, ' as fast')}")
    if "no difference" in groups:
        said.append(f"no difference found {_places(groups['no difference'], compared, f'between {a} and {b}')}")
    if "too few" in groups:
        said.append(
            f"too few requests to say {_places(groups['too few'], compared, f'which of {a} and {b} is faster')}"
        )
    said += [_stops(one) for others, one in compared.break_evens if not others and one.kind == "at"]
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}."


def cautions(compared: Compared) -> list[str]:
    """What a reader of the verdict must know: failures, runs cut short, one round alone, answers of other lengths."""
    a, b, loads = compared.a.variant, compared.b.variant, compared.loads
    found = []
    for name, sides in ((a, [at.a for at in loads]), (b, [at.b for at in loads])):
        failed = sum(side.failed for side in sides)
        if failed:
            total = failed + sum(side.completed for side in sides)
            found.append(f"{failed} of {total} requests to {name} failed; they are left out of all times.")
    if not all(at.complete for at in loads):
        found.append("The measurement was cut short; what had been measured by then is here.")
    if any(at.rounds == 1 for at in loads):
        found.append("One round tells nothing of drift: its bounds hold for that round alone.")
    lengths = [_length([at.a for at in loads]), _length([at.b for at in loads])]
    if min(lengths) and max(lengths) > LONGER * min(lengths):
        told = f"{lengths[0]:.1f} tokens on average with {a}, {lengths[1]:.1f} with {b}"
        found.append(f"Answers differ in length ({told}): compare times per token rather than E2EL.")
    return found


def notes(compared: Compared) -> list[str]:
    """What a reader of single figures may take wrongly."""
    drafted = any(at.a.acceptance or at.b.acceptance for at in compared.loads)
    return [ITL] if drafted else []


def stated(ratio: Ratio | None) -> str:
    """A speedup with its bounds: "1.25× (1.21–1.29)"."""
    if ratio is None:
        return "–"
    bounds = ratio.bounds
    return f"{ratio.speedup:.2f}×" + ("" if bounds is None else f" ({bounds[0]:.2f}–{bounds[1]:.2f})")


def break_even_lines(compared: Compared, *, told: bool = False) -> list[str]:
    """A sentence for each line of loads; with `told` those left out that the verdict says."""
    return [
        (f"With {load_name(others)}: " if others else "") + break_even_text(one, compared.b.variant)
        for others, one in compared.break_evens
        if others or not told or one.kind in ("beyond", "open", "never")
    ]


def break_even_text(one: BreakEven, b: str) -> str:
    """A sentence of its own, also where nothing was crossed."""
    lowest, highest = (load_name({one.axis: load}) for load in (one.lowest, one.highest))
    wins = "" if one.wins is None else load_name({one.axis: one.wins})
    if one.kind == "at":
        sentence = _stops(one)
        return f"{b}{sentence[2:]}."
    return {
        "beyond": f"{b} still wins at {highest}, the highest load measured.",
        "open": f"Where {b} stops winning was not found: it wins at {wins}, and neither side was found to win at "
        f"{highest}, the highest load measured.",
        "never": f"{b} was not found to win at any load measured, from {lowest} to {highest}.",
        "no difference": f"Nobody was found to win at any load measured, from {lowest} to {highest}.",
    }[one.kind]


def _counted(compared: Compared, groups: Mapping[Outcome, Sequence[AtLoad]]) -> str:
    """Where more than one thing was varied: at how many loads, with the best and the worst of them."""
    names, total = (compared.a.variant, compared.b.variant), len(compared.loads)
    said = []
    if "faster" in groups:
        said.append(f"{names[1]} is {_range(groups['faster'], names[0], total, best=True)}")
    if "slower" in groups:
        said.append(f"{'it' if said else names[1]} is {_range(groups['slower'], names[0], total, best=False)}")
    said += [f"no difference found at {len(groups['no difference'])} of {total}"] if "no difference" in groups else []
    said += [f"too few requests to say at {len(groups['too few'])} of {total}"] if "too few" in groups else []
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _range(loads: Sequence[AtLoad], a: str, total: int, *, best: bool) -> str:
    """The least and the greatest speedup, at how many loads, and the load of the one that counts."""
    known = sorted((at.headline.speedup, load_name(at.load)) for at in loads if at.headline is not None)
    (low, worst), (high, at_best) = known[0], known[-1]
    span = " to ".join(dict.fromkeys(f"{speedup:.2f}×" for speedup in (low, high)))
    number = f"all {total}" if len(known) == total else f"{len(known)} of {total}"
    return f"{span} as fast as {a} at {number} loads ({f'best: {at_best}' if best else f'worst: {worst}'})"


def _speedups(loads: Sequence[AtLoad], compared: Compared, unit: str) -> str:
    """Each with its load and bounds, the unit told once; of many loads the first and the last."""
    shown = [at for at in loads if at.headline is not None and at.headline.bounds is not None]
    ends = len(shown) > LISTED
    parts: list[str] = []
    for at in [shown[0], shown[-1]] if ends else shown:
        assert at.headline is not None and at.headline.bounds is not None
        low, high = at.headline.bounds
        share = "" if parts else f"{100 * compared.confidence:g} %: "
        place = f" at {load_name(at.load)}" if at.load else ""
        parts.append(f"{at.headline.speedup:.2f}×{'' if parts else unit}{place} ({share}{low:.2f}–{high:.2f})")
    return (" to " if ends else ", ").join(parts)


def _places(loads: Sequence[AtLoad], compared: Compared, whole: str) -> str:
    """Where, with the farthest bounds and the number of pairs; `whole` where that is at all loads."""
    pairs = sum(at.pairs for at in loads)
    bounds = [at.headline.bounds for at in loads if at.headline is not None and at.headline.bounds is not None]
    share = f"{100 * compared.confidence:g} %: "
    told = f"{share}{min(low for low, _ in bounds):.2f}–{max(high for _, high in bounds):.2f}" if bounds else ""
    told = ", ".join(part for part in (told, f"{pairs} pairs") if part)
    if len(loads) == len(compared.loads):
        return f"{whole} ({told})"
    return f"at {load_names([at.load for at in loads])} ({told})"


def _stops(one: BreakEven) -> str:
    """Of kind "at"."""
    assert one.load is not None
    sentence = f"it stops winning at about {load_name({one.axis: round(one.load, 1 if one.load < 10 else None)})}"
    if not one.bounded:
        return sentence
    low = f"below {number(one.lowest)}" if one.low is None else f"{one.low:.3g}"
    high = f"beyond {number(one.highest)}" if one.high is None else f"{one.high:.3g}"
    return f"{sentence} ({low} to {high})"


def _length(sides: Sequence[Summary]) -> float:
    """Output tokens of a request, on average."""
    completed = sum(side.completed for side in sides)
    return sum(side.total_output_tokens for side in sides) / completed if completed else 0.0
