"""Tells proposers that listen what their requests' texts are, after each step."""

from __future__ import annotations

from collections.abc import Iterable

from specserve.core.messages import RequestOutput
from specserve.scheduling.request import Request
from specserve.speculation.registry import ProposerRegistry


class Listening:
    """Which requests are listened to, and how many tokens of each have been told of."""

    def __init__(self, proposers: ProposerRegistry) -> None:
        self._proposers = proposers
        self._told: dict[str, tuple[Request, int]] = {}

    def add(self, request: Request) -> None:
        """A request was queued; nothing is told of it before its first committed token."""
        if request.proposer is not None and self._proposers.listeners(request.proposer):
            self._told[request.request_id] = request, 0

    def note(self, outputs: Iterable[RequestOutput]) -> None:
        """A step's outputs have come."""
        for output in outputs:
            if output.request_id in self._told:
                self._tell(output.request_id)
                if output.finish_reason is not None:
                    self.end(output.request_id)

    def end(self, request_id: str) -> None:
        """The request is over, whoever ended it; others than those added are ignored."""
        request, _ = self._told.pop(request_id, (None, 0))
        if request is not None and request.proposer is not None:
            for listener in self._proposers.listeners(request.proposer):
                listener.end(request_id)

    def _tell(self, request_id: str) -> None:
        request, told = self._told[request_id]
        new = request.token_ids[told:]
        if not new or request.root is None or request.proposer is None:  # one that failed has had no row
            return
        for listener in self._proposers.listeners(request.proposer):
            if told:
                listener.extend(request_id, new)
            else:
                listener.begin(request_id, request.root, new, request.cached_tokens)
        self._told[request_id] = request, request.num_tokens
