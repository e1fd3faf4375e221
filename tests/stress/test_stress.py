"""Everything at once: requests of every kind on adapters that are loaded, reloaded, pinned, unloaded and broken under
them, with few device slots, little host memory and few KV blocks. Every answer is the one that transformers and peft
give with the version that the request began with, figures agree throughout, and in the end nothing is left.

STRESS_SECONDS and STRESS_SEED choose how long and which; STRESS_DEVICE=cuda where. A failure names the seed of its
round: STRESS_ROUND=<seed> plays that round alone.
"""

from __future__ import annotations

import os
import time
from itertools import count

import pytest

from lawbook.plain import MAX_EXCUSED
from stresskit.play import Stage

TURNS = 150  # of a round
TURNS_GPU = 600  # where it takes longer to open an engine


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_short_stress(seed: int, stage: Stage) -> None:
    """A few rounds that are the same each time."""
    stage.play(seed, TURNS, patient=True)


@pytest.mark.stress
def test_stress(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds until the time is over; in half of them reads end when they end."""
    seconds, seed = float(os.environ.get("STRESS_SECONDS", "60")), int(os.environ.get("STRESS_SEED", "0"))
    first = int(os.environ.get("STRESS_ROUND", seed * 1_000_000))
    start = time.monotonic()
    for number in count(first):
        stage.play(number, TURNS if stage.device == "cpu" else TURNS_GPU)
        if time.monotonic() - start > seconds or "STRESS_ROUND" in os.environ:
            break
    with capsys.disabled():
        print("\n" + stage.report(time.monotonic() - start))
    assert stage.judge.excused <= MAX_EXCUSED * stage.judge.compared
