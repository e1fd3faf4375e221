"""What a refused body might have said instead: the choices or the fields that its type has at that place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache

from msgspec import inspect

_PLACE = re.compile(r" - at `(\$[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$[^`]*`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[[^\]]*\]")  # .field or [index]; `[...]` stands for any value of a mapping


def hint(message: str, kind: type) -> str:
    """What to do about one of msgspec's messages on a `kind`, as words to put behind it; "" where its type knows no
    more than the message says.
    """
    place = _PLACE.search(message)
    types = list(_types_at(place.group(1) if place else "$", kind))
    unknown = _UNKNOWN.match(message)
    if unknown:
        return _fields_hint(unknown.group(1), sorted(_fields(types)))
    if message.startswith("Invalid enum value"):
        choices = ", ".join(map(repr, _choices(types)))
        return f"; it may be {choices}" if choices else ""
    return ""


def _fields_hint(name: str, known: list[str]) -> str:
    if not known:
        return ""
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f"; did you mean `{nearest[0]}`?" if nearest else "."
    return f"{meant} Known here: {', '.join(known)}"


def _types_at(path: str, kind: type) -> Iterator[inspect.Type]:
    """The types that a value at `path` ($.messages[0].role) may have, unions taken apart; none if it leads nowhere."""
    types = list(_alternatives(_type_info(kind)))
    for step in _STEP.finditer(path):
        inner = [_inside(each, step.group(1)) for each in types]
        types = [found for each in inner if each is not None for found in _alternatives(each)]
    yield from types


@cache
def _type_info(kind: type) -> inspect.Type:
    return inspect.type_info(kind)


def _alternatives(one: inspect.Type) -> Iterable[inspect.Type]:
    return one.types if isinstance(one, inspect.UnionType) else (one,)


def _inside(one: inspect.Type, field: str | None) -> inspect.Type | None:
    """The type of a struct's field, or of an array's or mapping's values (`field` None)."""
    if field is None:
        if isinstance(one, inspect.ListType | inspect.VarTupleType):
            return one.item_type
        return one.value_type if isinstance(one, inspect.DictType) else None
    fields = one.fields if isinstance(one, inspect.StructType) else ()
    return next((each.type for each in fields if each.encode_name == field), None)


def _fields(types: Iterable[inspect.Type]) -> Iterator[str]:
    for one in types:
        if isinstance(one, inspect.StructType):
            yield from (field.encode_name for field in one.fields)


def _choices(types: Iterable[inspect.Type]) -> Iterator[object]:
    for one in types:
        if isinstance(one, inspect.LiteralType):
            yield from one.values
