"""Which model and adapters a request means."""

from __future__ import annotations

from collections.abc import Container, Sequence

from specserve.core.errors import InvalidRequestError, NotFoundError
from specserve.core.messages import LoraRef

LoraField = str | LoraRef | list[str | LoraRef] | None


def select_lora(
    model: str | None, lora: LoraField, *, base_names: Sequence[str], adapters: Container[str]
) -> tuple[LoraRef, ...]:
    """The adapters of a request; () is the base. `model` may name the base or an adapter, or be left out.

    Raises NotFoundError for an unknown model, InvalidRequestError when `model` and `lora` disagree.
    """
    refs = _refs(lora)
    if model is None or model in base_names:
        return refs
    if model not in adapters:
        raise NotFoundError(f"The model {model!r} does not exist; GET /v1/models lists those that do.", param="model")
    if lora is None:
        return (LoraRef(model),)
    if [ref.name for ref in refs] != [model]:
        named = ", ".join(ref.name for ref in refs) or "the base"
        raise InvalidRequestError(
            f"model names the adapter {model!r} and lora {named}: they disagree. Name adapters in one of them.",
            param="lora",
        )
    return refs


def _refs(lora: LoraField) -> tuple[LoraRef, ...]:
    if lora is None:
        return ()
    items = lora if isinstance(lora, list) else [lora]
    return tuple(LoraRef(item) if isinstance(item, str) else item for item in items)
