"""Corrections: how far the steps that run differ from what the table says they take.

Contexts grow, the host is busy, others use the machine: a step takes longer than its trial did. What has nothing to do
with drafts is the same milliseconds whatever their number; what has, grows with them. So for each size of batch a line
is fitted to the latest steps,

    observed − table ≈ offset + slope · (table − decode),

where `decode` is what the table says of a step without drafts. The offset is what steps without drafts show, once some
were seen, so that what they take is known whatever the others do. The slope is a least-squares fit, to what the others
took beyond the offset of their time, whose past fades and which is held towards 0 as long as step times vary more than
numbers of drafts do. Single stalls are clipped, those of steps with drafts and those of steps without apart, so that
the first of a kind may be a surprise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FADE = 1.0 - 1.0 / 120.0  # what a step leaves of those before it
PLAIN_FADE = 0.8  # what a step without drafts leaves of those without before it
ENOUGH = 3  # steps, to say anything
EARLY, CONTROL_AFTER = 6, 150  # steps with drafts, until one without is wanted: of the first three, and then
FAR = 4.0  # times the usual deviation: what lies farther off is brought that near
TOLERANCE = 0.03  # of a step's time: less is noise, and nobody's choice changes by it
LEAST_SLOPE = -0.9  # drafts never become free


@dataclass(frozen=True, slots=True)
class Line:
    """What is added to a step's time, in milliseconds, that takes `beyond` more than one without drafts."""

    offset: float = 0.0
    slope: float = 0.0

    def at(self, beyond: float) -> float:
        return self.offset + self.slope * beyond


NOTHING = Line()


@dataclass(slots=True)
class _Fit:
    """Faded sums over the steps of one size of batch, x = table − decode and y = observed − table."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    plain: int = 0  # steps without drafts that were seen
    plain_y: float = 0.0  # the mean of what they took beyond the table, of the latest ones
    beyond: float = 0.0  # faded sum of x times what steps took beyond that
    seen: int = 0  # steps of either kind
    since_plain: int = 0  # steps since one without drafts
    deviations: dict[bool, float] = field(default_factory=dict)  # of steps without drafts, and with
    now: Line = NOTHING
    told: Line = NOTHING

    def add(self, x: float, y: float, decode: float) -> None:
        drafts, off = x > 0.0, y - self.now.at(x)
        usual = self.deviations.get(drafts)
        if usual is not None and (self.seen - self.plain if drafts else self.plain) >= 2 * ENOUGH:
            off = max(-FAR * usual, min(FAR * usual, off))
        self.deviations[drafts] = abs(off) if usual is None else 0.9 * usual + 0.1 * max(abs(off), 0.01 * decode)
        y = self.now.at(x) + off
        self.weight, self.x, self.y = FADE * self.weight + 1.0, FADE * self.x + x, FADE * self.y + y
        self.xx, self.xy = FADE * self.xx + x * x, FADE * self.xy + x * y
        self.seen += 1
        self.since_plain = self.since_plain + 1 if drafts else 0
        self.beyond = FADE * self.beyond + x * (y - self.plain_y)
        if not drafts:
            self.plain += 1
            self.plain_y += max(1.0 - PLAIN_FADE, 1.0 / self.plain) * (y - self.plain_y)
            if self.plain <= ENOUGH:  # so far there was no offset to speak of
                self.beyond = self.xy - self.plain_y * self.x
        self.now = self._line(max(self.deviations[drafts], 0.01 * decode) ** 2)

    def _line(self, doubt: float) -> Line:
        """`doubt`: the variance of step times; the slope's normal prior has deviation 1."""
        if self.plain >= ENOUGH:
            return Line(self.plain_y, max(LEAST_SLOPE, self.beyond / (self.xx + doubt)))
        spread = self.xx - self.x * self.x / self.weight
        slope = max(LEAST_SLOPE, (self.xy - self.x * self.y / self.weight) / (spread + doubt))
        return Line((self.y - slope * self.x) / self.weight, slope)


class Corrections:
    """`version` changes whenever an answer does."""

    def __init__(self) -> None:
        self.version = 0
        self._fits: dict[int, _Fit] = {}  # by rows' bits

    def observe(self, rows: int, decode: float, table: float, observed: float) -> None:
        """A step took `observed` milliseconds where the table says `table`, and `decode` of one without drafts."""
        fit = self._fits.setdefault(rows.bit_length(), _Fit())
        fit.add(table - decode, observed - table, decode)
        if fit.seen < ENOUGH:
            return
        for beyond in (0.0, decode):
            time = decode + beyond
            if abs(fit.now.at(beyond) - fit.told.at(beyond)) > TOLERANCE * (time + max(0.0, fit.now.at(beyond))):
                fit.told = fit.now
                self.version += 1
                return

    def line(self, rows: int) -> Line:
        """What to add to the table's milliseconds for a batch of this size."""
        fit = self._fits.get(rows.bit_length())
        return NOTHING if fit is None else fit.told

    def wants_plain(self, rows: int) -> bool:
        """Whether a step without drafts should tell what such a step takes: three early ones, for while all steps have
        drafts nobody can tell offset from slope, then one now and then."""
        fit = self._fits.get(rows.bit_length())
        return fit is not None and fit.since_plain >= (EARLY if fit.plain < ENOUGH else CONTROL_AFTER)
