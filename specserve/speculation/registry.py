"""Proposers by name. Each file registers its own; the engine asks here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from specserve.core.errors import InvalidRequestError
from specserve.speculation.combined import CombinedProposer
from specserve.speculation.draft_model import DraftModelProposer
from specserve.speculation.ngram import NgramProposer
from specserve.speculation.proposer import Continuing, Listener, Proposer
from specserve.speculation.suffix import SuffixProposer

Factory = Callable[[], Proposer]

BUILT_IN: dict[str, Factory] = {"draft_model": DraftModelProposer, "ngram": NgramProposer, "suffix": SuffixProposer}


class ProposerRegistry:
    """The proposers of one engine, and each pair `first+second` of them that makes sense. `draft_model` is there only
    with a draft model."""

    def __init__(self, *, has_draft_model: bool, extra: Iterable[Proposer] = ()) -> None:
        built = [factory() for factory in BUILT_IN.values()]
        single = [p for p in (*built, *extra) if has_draft_model or not p.keeps_kv]
        self._by_name = {p.name: p for p in (*single, *_pairs(single))}
        self._listeners = {name: _listeners(proposer) for name, proposer in self._by_name.items()}

    @property
    def names(self) -> list[str]:
        return sorted(self._by_name)

    def get(self, name: str) -> Proposer:
        """Raise InvalidRequestError naming the field if there is no such proposer here."""
        if name not in self._by_name:
            raise InvalidRequestError(f"speculation.proposer {self.unavailable(name)}", param="speculation")
        return self._by_name[name]

    def listeners(self, name: str) -> list[Listener]:
        """Those who want to be told what is committed for requests that `name` drafts for."""
        self.get(name)
        return self._listeners[name]

    def unavailable(self, name: str) -> str:
        """What to say to whoever asked for a proposer that is not here."""
        hint = " draft_model needs --draft-model." if "draft_model" in name.split("+") else ""
        return f"{name!r} is not available; choose from {', '.join(self.names)}.{hint}"

    def keeps_kv(self) -> dict[str, bool]:
        return {name: proposer.keeps_kv for name, proposer in self._by_name.items()}


def _pairs(single: Sequence[Proposer]) -> list[Proposer]:
    """Whoever keeps KV drafts for every row, so it comes second, and only if it can go on from what it is given."""
    return [
        CombinedProposer(first, second)
        for first, second in permutations(single, 2)
        if not first.keeps_kv and (isinstance(second, Continuing) or not second.keeps_kv)
    ]


def _listeners(proposer: Proposer) -> list[Listener]:
    parts = (proposer.first, proposer.second) if isinstance(proposer, CombinedProposer) else (proposer,)
    return [part for part in parts if isinstance(part, Listener)]
