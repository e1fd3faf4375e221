"""One round: an engine with few slots and little memory, and everything that users do to it, at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stresskit.contents import Library
from stresskit.crowd import Crowd
from stresskit.owner import Owner
from stresskit.scene import Scene
from stresskit.truth import Answer

MAX_STEPS = 20_000  # far beyond what a round needs to come to its end


class Round:
    """`play()` gives the answers to be judged. `patient`: reads are waited for, so that the round repeats itself."""

    def __init__(self, scene: Scene, library: Library, root: Path, *, patient: bool) -> None:
        self.scene, self.engine, self.patient = scene, scene.engine, patient
        self.crowd = Crowd(scene)
        self.owner = Owner(scene, library, root)
        self._acts: list[Callable[[], None]] = []
        for weight, act in (
            (40, self.crowd.ask), (3, self.crowd.flood), (6, self.crowd.abort), (8, self.owner.rewrite),
            (8, self.owner.reload), (2, self.owner.spoil), (4, self.owner.unload), (6, self.owner.load),
            (3, self.owner.pin), (3, self.owner.hurry), (20, lambda: None),
        ):  # fmt: skip
            self._acts += [act] * weight

    def play(self, turns: int) -> list[Answer]:
        rng = self.scene.rng
        self.owner.begin()
        for turn in range(turns):
            rng.choice(self._acts)()
            for _ in range(rng.choice((0, 1, 1, 2, 5))):
                self.step()
            if turn % 20 == 0:
                self.scene.books.check(self.crowd.asked.values())
        self._end()
        return self.crowd.answers

    def step(self) -> None:
        """What the engine's process does in one turn of its loop."""
        for output in self.engine.step() if self.engine.has_work() else []:
            self.crowd.hear(output)
        if self.patient:
            self.engine.adapters.wait(10)
        self.owner.replied(self.engine.poll_replies())
        if self.engine.adapters.num_reading == 0:
            self.scene.ledger.quiet()

    def _end(self) -> None:
        """Everything is unloaded, half of the time under its requests; nothing is left."""
        if self.scene.rng.random() < 0.5:
            self._drain()
        self.owner.end()
        self._drain()
        self.owner.end()  # what was still being loaded
        self._drain()
        assert not self.crowd.asked and not self.owner.loads
        self.scene.books.check_empty()

    def _drain(self) -> None:
        for _ in range(MAX_STEPS):
            if not self.engine.has_work() and not self.engine.adapters.num_reading:
                return
            self.step()
            if not self.engine.has_work():
                self.engine.adapters.wait(10)
        raise AssertionError("the engine has work and gets nowhere")
