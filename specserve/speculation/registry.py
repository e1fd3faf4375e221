"""Proposers by name. Each file registers its own; the engine asks here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from specserve.core.errors import InvalidRequestError
from specserve.speculation.draft_model import DraftModelProposer
from specserve.speculation.ngram import NgramProposer
from specserve.speculation.proposer import Proposer

Factory = Callable[[], Proposer]

BUILT_IN: dict[str, Factory] = {"draft_model": DraftModelProposer, "ngram": NgramProposer}


class ProposerRegistry:
    """The proposers of one engine. `draft_model` is there only with a draft model."""

    def __init__(self, *, has_draft_model: bool, extra: Iterable[Proposer] = ()) -> None:
        built = [factory() for factory in BUILT_IN.values()]
        self._by_name = {p.name: p for p in (*built, *extra) if has_draft_model or not p.keeps_kv}

    @property
    def names(self) -> list[str]:
        return sorted(self._by_name)

    def get(self, name: str) -> Proposer:
        """Raise InvalidRequestError naming the field if there is no such proposer here."""
        if name not in self._by_name:
            hint = " Start with --draft-model to use it." if name == "draft_model" else ""
            raise InvalidRequestError(
                f"speculation.proposer {name!r} is not available; choose from {', '.join(self.names)}.{hint}",
                param="speculation",
            )
        return self._by_name[name]

    def keeps_kv(self) -> dict[str, bool]:
        return {name: proposer.keeps_kv for name, proposer in self._by_name.items()}
