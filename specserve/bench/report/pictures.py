"""All pictures that the records allow, the most telling ones first."""

from __future__ import annotations

from collections.abc import Sequence

from specserve.bench.compare import Compared
from specserve.bench.records import Comparison
from specserve.bench.report.curves import throughput
from specserve.bench.report.drafts import drafts
from specserve.bench.report.gains import speedup_by_acceptance
from specserve.bench.report.latencies import latencies
from specserve.bench.report.overhead import overhead
from specserve.bench.report.speedups import speedups
from specserve.bench.report.theme import Picture


def pictures_of(comparison: Comparison, found: Sequence[Compared]) -> list[Picture]:
    return [
        *(picture for place, compared in enumerate(found, 1) for picture in speedups(compared, place)),
        *throughput(comparison),
        *(picture for place, one in enumerate(found, 1) for picture in speedup_by_acceptance(comparison, one, place)),
        *latencies(comparison),
        *overhead(comparison),
        *drafts(comparison),
    ]
