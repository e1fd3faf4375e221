"""A round from its seed: settings, engine, traffic, and the verdict."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lawbook.fakes import fakes
from lawbook.zoo import Zoo
from specserve.llm import LLM
from stresskit.contents import MAX_RANK, Library
from stresskit.late import delay_loads, delay_reads
from stresskit.round import Round
from stresskit.scene import Scene
from stresskit.truth import Judge

HOST_BYTES = 125_000  # the two largest contents with their companions (59 kB each), and little more
BARS = "tqdm_monitor"  # a thread that watches the bars of transformers
DEADLINE = 10.0  # seconds for threads that were told to end


@dataclass
class Stage:
    """Everything that rounds share; `counts` of what happened in all of them."""

    zoo: Zoo
    library: Library
    judge: Judge
    root: Path
    device: str
    counts: Counter[str] = field(default_factory=Counter)

    def play(self, seed: int, turns: int, *, patient: bool | None = None) -> None:
        """One round, and the verdict on its answers. What a seed does is the same each time, but for the moments at
        which reads end, if it is not patient."""
        rng = random.Random(seed)
        patient = rng.random() < 0.5 if patient is None else patient
        before = set(threading.enumerate())
        llm = self._open(rng)
        folders = self.root / f"round{seed}"
        late = rng.random() < 0.6 and self.device == "cpu"
        if late:
            delay_loads(llm, rng)
        if not patient:
            delay_reads(llm, rng)
        scene = Scene(llm, rng)
        try:
            answers = Round(scene, self.library, folders, patient=patient).play(turns)
            llm.close()
            _wait_for_threads(before)
            wrong = self.judge.hear(answers)
            assert not wrong, f"{len(wrong)} of {len(answers)} answers are wrong:\n" + "\n".join(wrong[:5])
        except BaseException as error:
            error.add_note(f"Round {seed} (patient: {patient}, late: {late}, {turns} turns, {llm.config}); last:")
            error.add_note("\n".join(scene.log))
            raise
        finally:
            llm.close()
        stats = llm.engine.stats()
        self.counts += scene.counts + Counter(
            rounds=1, preemptions=stats.preemptions, cached=stats.prefix_hits, accepted=stats.num_accepted_tokens,
            tokens=stats.generation_tokens, over_budget=scene.books.over_budget,
        )  # fmt: skip

    def report(self, seconds: float) -> str:
        judge = self.judge
        said = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        rate = self.counts["answered"] / seconds
        return (
            f"{seconds:.0f} s: {rate:.1f} answered requests/s; {said}; {judge.compared} answers held against the truth"
            f", {judge.ambiguous} with more than one admissible version, {judge.excused} excused for a near tie"
        )

    def _open(self, rng: random.Random) -> LLM:
        return LLM(
            model=str(self.zoo.target),
            draft_model=str(self.zoo.drafts["near"]),
            dtype="float32",
            device=self.device,
            block_size=4,
            max_model_len=48,
            max_num_seqs=6,
            num_blocks=rng.choice((17, 30, 73)),
            max_num_batched_tokens=rng.choice((8, 16, 128)),
            max_loras=3,
            max_lora_rank=MAX_RANK,
            max_host_lora_bytes=HOST_BYTES,
            enable_prefix_caching=rng.random() < 0.8,
            pipeline_depth=rng.choice((1, 2)),
            enforce_eager=rng.random() < 0.5,
            check_integrity=True,
            proposers=fakes(()),
        )


def _wait_for_threads(before: set[threading.Thread]) -> None:
    end = time.monotonic() + DEADLINE
    while left := [t for t in threading.enumerate() if t not in before and t.name != BARS]:
        assert time.monotonic() < end, f"threads are left: {left}"
        time.sleep(0.01)
