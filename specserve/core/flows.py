"""Which requests count as one when the engine is shared out."""

from __future__ import annotations

from collections.abc import Iterable

from specserve.core.messages import LoraRef

FlowKey = tuple[str, ...]


def flow_key(lora: Iterable[LoraRef]) -> FlowKey:
    """Requests that name the same adapters, in whatever order and at whatever scale, are one flow; () is the base."""
    return tuple(sorted({ref.name for ref in lora}))
