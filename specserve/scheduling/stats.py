"""What the scheduler has counted since start."""

from __future__ import annotations

from dataclasses import dataclass, field

from specserve.core.plan import PlanRow, RowResult


@dataclass(slots=True)
class SchedulerStats:
    """Monotonic counters. Rounds whose draft j was made: `drafted_per_pos[j]`, and accepted: `accepted_per_pos[j]`."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_pos: list[int] = field(default_factory=list)
    accepted_per_pos: list[int] = field(default_factory=list)

    def record(self, row: PlanRow, result: RowResult, num_emitted: int) -> None:
        """Count what one row of a step gave, and its verification round if it drafted."""
        self.generation_tokens += num_emitted
        if not row.num_drafts:
            return
        self.rounds += 1
        self.drafted += result.num_drafted
        self.accepted += result.num_accepted
        for counts, count in ((self.drafted_per_pos, result.num_drafted), (self.accepted_per_pos, result.num_accepted)):
            counts.extend([0] * (row.num_drafts - len(counts)))
            for index in range(count):
                counts[index] += 1
