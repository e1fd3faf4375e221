"""Calls about adapters: answered at once, or when a folder has been read."""

from __future__ import annotations

from specserve.core.checks import check_weight
from specserve.core.errors import NotFoundError, SpecserveError
from specserve.core.messages import AdapterInfo, ErrorInfo, ListAdapters, LoadAdapter, PinAdapter, Reply, UnloadAdapter
from specserve_adapters.manager import AdapterManager, LoadTicket

AdapterCall = LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters


class AdapterCalls:
    """The calls that one manager answers, and those of them that still wait for a read."""

    def __init__(self, adapters: AdapterManager) -> None:
        self._adapters = adapters
        self._loads: dict[int, LoadTicket] = {}  # by call id

    @property
    def waiting(self) -> bool:
        """Whether an answer is still owed."""
        return bool(self._loads)

    def handle(self, call: AdapterCall) -> Reply | None:
        """Answer now, or later through `finished` (None) when it must read from disk."""
        try:
            return self._handle(call)
        except SpecserveError as error:
            return Reply(call_id=call.call_id, error=ErrorInfo.of(error))

    def finished(self) -> list[Reply]:
        """Replies of loads that have ended since the last call."""
        done = [call_id for call_id, ticket in self._loads.items() if ticket.done]
        return [self._load_reply(call_id, self._loads.pop(call_id)) for call_id in done]

    def _handle(self, call: AdapterCall) -> Reply | None:
        if isinstance(call, LoadAdapter):
            return self._load(call)
        if isinstance(call, UnloadAdapter):
            self._adapters.unload(call.name)
            return Reply(call_id=call.call_id)
        if isinstance(call, ListAdapters):
            infos = self._adapters.list() if call.name is None else self._look(call.name)
            return Reply(call_id=call.call_id, adapters=infos)
        self._adapters.pin(call.name, call.pinned)
        return Reply(call_id=call.call_id, adapters=self._look(call.name))

    def _load(self, call: LoadAdapter) -> Reply | None:
        check_weight(call.weight)
        if not call.read:
            self._adapters.register(call.name, call.path, call.draft_path, weight=call.weight)
            return Reply(call_id=call.call_id, adapters=self._look(call.name))
        self._loads[call.call_id] = self._adapters.load(
            call.name, call.path, draft_path=call.draft_path, pinned=call.pinned, replace=call.replace,
            weight=call.weight,
        )  # fmt: skip
        return None

    def _load_reply(self, call_id: int, ticket: LoadTicket) -> Reply:
        if ticket.error is not None:
            return Reply(call_id=call_id, error=ErrorInfo.of(ticket.error))
        return Reply(call_id=call_id, adapters=self._look(ticket.name))

    def _look(self, name: str) -> list[AdapterInfo]:
        try:
            return [self._adapters.info(name)]
        except NotFoundError:
            return []  # unloaded since
