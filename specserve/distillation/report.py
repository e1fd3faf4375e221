"""What a distillation tells at its end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from specserve.distillation.measure import Acceptance

_HEAD = ("", "accepted", "greedy", "engine, sampled", "tokens a round", "engine, greedy", "tokens a round")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome. `acceptance` has "base draft", "before" if the adapter had a companion, and "after"."""

    name: str
    acceptance: dict[str, Acceptance]
    stored: Path | None  # None: refused, because drafts would be accepted less often than before
    work: Path  # still there if refused
    temperature: float
    num_texts: int
    num_tokens: int  # trained on
    num_held_out: int  # texts measured on
    too_long: int  # prompts left out
    seconds: dict[str, float]  # a stage of this run; stages that an earlier run finished take no time

    @property
    def gain(self) -> float:
        """What the acceptance grew by, against what drafted before."""
        before = self.acceptance.get("before", self.acceptance["base draft"])
        return self.acceptance["after"].alpha - before.alpha

    def text(self) -> str:
        """Some lines for a terminal."""
        return "\n".join([*self._table(), "", *self._outcome()])

    def _table(self) -> list[str]:
        rows = [_HEAD, *(_row(name, found) for name, found in self.acceptance.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]

    def _outcome(self) -> list[str]:
        spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        lines = [
            f"At temperature {self.temperature:g}, on {self.num_held_out} held-out texts, ± one standard error. "
            "The first column decides; the engine's are of other texts on the same prompts. Trained on "
            f"{self.num_texts} texts of {self.num_tokens} tokens. {spent}."
        ]
        if self.too_long:
            lines.append(f"{self.too_long} prompts were too long for the models' context and were left out.")
        if self.stored is not None:
            return [*lines, f"The companion of {self.name!r} is in {self.stored}."]
        return [
            *lines,
            f"Drafts would be accepted less often than before ({self.gain:+.1%}), so nothing was changed. More texts "
            "(--samples), more --steps, another --learning-rate or prompts like those served (--prompts) may help; "
            f"texts are kept in {self.work}. --force stores it as it is.",
        ]


def _row(name: str, found: Acceptance) -> tuple[str, ...]:
    engine = [
        cell
        for one in (found.sampled_engine, found.greedy_engine)
        for cell in (
            _share(one.accepted, one.accepted_error),
            _tokens(one.tokens_per_round, one.tokens_per_round_error),
        )
    ]
    return (name, _share(found.alpha, found.alpha_error), _share(found.greedy, found.greedy_error), *engine)


def _share(value: float, error: float | None) -> str:
    return f"{value:.1%}" if error is None else f"{value:.1%} ±{100 * error:.1f}"


def _tokens(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ±{error:.2f}"
