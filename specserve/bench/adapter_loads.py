"""Which adapters a load uses where their number or rank is varied, and what ranks the adapters of a side have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from specserve.bench.options import refused
from specserve.bench.records import Load
from specserve.bench.variants import Variant

CONFIG = "adapter_config.json"  # of a PEFT folder

Ranks = Mapping[str, int]  # by adapter


def modules_of(load: Load, names: Sequence[str], ranks: Callable[[], Ranks]) -> tuple[str, ...]:
    """Of the named adapters those that a load uses: the first so many, those of one rank, or all if neither is varied.

    None of either is the base model alone. Raises InvalidRequestError if there are no such adapters.
    """
    if "adapters" in load:
        count = int(load["adapters"])
        if count > len(names):
            raise refused("adapters", f"takes the first {count} of --lora-modules, which names {len(names)}.")
        return tuple(names[:count])
    if "rank" not in load:
        return tuple(names)
    if not load["rank"]:
        return ()
    known = ranks()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise refused("ranks", f"needs sides that name the folder of each adapter: not of {', '.join(unknown)}.")
    found = tuple(name for name in names if known[name] == load["rank"])
    if not found:
        told = ", ".join(f"{name} has {known[name]}" for name in names)
        raise refused(
            "ranks", f"finds no adapter of rank {load['rank']:g} in --lora-modules: {told or 'there is none'}."
        )
    return found


def ranks_of(variants: Sequence[Variant]) -> dict[str, int]:
    """Of the adapters whose folders the sides' commands name, as NAME=FOLDER or by `--lora-dir`."""
    found: dict[str, int] = {}
    for variant in variants:
        for name, folder in _folders(variant.command):
            rank = _rank(folder / CONFIG)
            if rank is not None:
                found.setdefault(name, rank)
    return found


def _folders(words: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for place, word in enumerate(words):
        flag, _, value = word.partition("=")
        name, _, path = (value if flag.startswith("--") else word).partition("=")
        if path:
            yield name, Path(path)
        if flag == "--lora-dir":
            root = Path(value or (words[place + 1] if words[place + 1 :] else ""))
            yield from ((folder.name, folder) for folder in sorted(root.glob("*")))


class _Config(msgspec.Struct):
    r: int


def _rank(config: Path) -> int | None:
    """None: there is no such file, or it tells none."""
    try:
        return msgspec.json.decode(config.read_bytes(), type=_Config).r
    except (OSError, msgspec.DecodeError):
        return None
