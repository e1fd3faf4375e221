"""Who asks: any number of requests of every kind, some of which leave before they are answered."""

from __future__ import annotations

from specserve.core.errors import AdapterBusyError, InvalidRequestError, NotFoundError
from specserve.core.messages import AddRequest, LoraRef, RequestOutput
from stresskit.scene import NAMES, Scene
from stresskit.traffic import Asked, draw_lora, draw_params, draw_prompt
from stresskit.truth import Answer

MAX_LIVE = 40  # requests, floods aside


class Crowd:
    """`asked`: requests under way; `answers`: what ended well, to be judged."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.engine, self.ledger, self.rng = scene, scene.engine, scene.ledger, scene.rng
        self.asked: dict[str, Asked] = {}
        self.answers: list[Answer] = []

    def ask(self) -> None:
        """One request, or a few for the same adapters."""
        lora = draw_lora(self.rng, self.rng.sample(NAMES, len(NAMES)))
        for _ in range(self.rng.choice((1, 1, 2, 4))):
            if len(self.asked) < MAX_LIVE:
                self._ask(lora)

    def flood(self) -> None:
        """Many requests for one name at once."""
        name = self.rng.choice(NAMES)
        for _ in range(self.rng.randint(4, 12)):
            self._ask(draw_lora(self.rng, [name]))

    def _ask(self, lora: tuple[LoraRef, ...]) -> None:
        params = draw_params(self.rng)
        request = AddRequest(
            request_id=f"r{self.scene.next_id()}",
            prompt_ids=draw_prompt(self.rng),
            params=params,
            seed=params.seed or 0,
            lora=lora,
        )
        infos = {info.name: info for info in self.engine.adapters.list()}
        asked, slots = {ref.name for ref in lora}, self.scene.books.num_slots
        crowd = asked | {name for name in infos if infos[name].pinned}
        try:
            self.engine.add_request(request)
        except NotFoundError:
            assert not asked <= infos.keys()
        except InvalidRequestError:
            assert len(asked) > slots
        except AdapterBusyError:
            assert len(crowd) > slots
        else:
            assert asked <= infos.keys() and (not asked or len(crowd) <= slots), request
            meanings = tuple(self.ledger.means(infos[ref.name]) for ref in lora)
            self.asked[request.request_id] = Asked(request, meanings, self.scene.books.arrived(asked))
            meant = [f"{ref.name} × {ref.scale}: {it.content}" for ref, it in zip(lora, meanings, strict=True)]
            self.scene.note(f"{request.request_id} asks {meant}")

    def abort(self) -> None:
        if self.asked:
            gone = self.rng.choice(sorted(self.asked))
            self.engine.abort_requests([gone])
            self.scene.books.left(self.asked.pop(gone))
            self.scene.note(f"{gone} is aborted")

    def hear(self, output: RequestOutput) -> None:
        asked = self.asked[output.request_id]
        answer = asked.hear(output, self.ledger)
        self.scene.books.heard(asked, output)
        if output.finish_reason is not None:
            self.scene.books.left(self.asked.pop(output.request_id))
            self.scene.note(f"{output.request_id} ends: {output.finish_reason}")
            self.scene.counts["failed" if answer is None else "answered"] += 1
        if answer is not None:
            self.answers.append(answer)
