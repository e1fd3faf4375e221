"""Plain records of the adapter manager: sources, names, versions of names, uses of versions. No tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specserve.core.errors import InvalidRequestError, SpecserveError

DRAFT_FOLDER = "draft"


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an adapter comes from. Without `draft_path`, its companion is the subfolder draft/, if there is one."""

    name: str
    path: Path
    draft_path: Path | None = None

    def companion(self) -> Path | None:
        """The draft companion's folder as of now."""
        if self.draft_path is not None:
            return self.draft_path
        default = self.path / DRAFT_FOLDER
        return default if default.is_dir() else None


@dataclass(slots=True, eq=False)
class NameRecord:
    """A registered name. It outlives its versions: counters go on over reloads."""

    name: str
    source: AdapterSource
    pinned: bool = False
    weight: float = 1.0  # share of tokens beside other adapters, > 0
    current: Entry | None = None  # what the next request gets; None: a new entry, to be read from disk
    version: str = ""  # these four: as of the last read, "" and None before the first
    rank: int | None = None
    num_bytes: int | None = None
    has_draft: bool | None = None
    running: int = 0
    requests: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    last_used: float | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """One version of one name. Its version is fixed by the read that loads it and never changes after."""

    record: NameRecord
    source: AdapterSource
    version: str = ""
    refs: int = 0  # uses by waiting and running requests
    reading: bool = False
    error: SpecserveError | None = None

    @property
    def loaded(self) -> bool:
        return bool(self.version)


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of one request. `scale` is a float32 value."""

    entry: Entry
    scale: float


@dataclass(slots=True, eq=False)
class LoadTicket:
    """A load under way. Once `done`, `error` says why it failed, or is None."""

    name: str
    source: AdapterSource
    pinned: bool = False
    replace: bool = False
    weight: float = 1.0
    done: bool = False
    error: SpecserveError | None = None


@dataclass(slots=True, eq=False)
class Read:
    """One read of a folder, for an entry that requests wait for or for a load."""

    source: AdapterSource
    purpose: Entry | LoadTicket = field(repr=False)


def to_float32(scale: float) -> float:
    """The nearest float32. Raises InvalidRequestError beyond its range."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", scale))[0])
    except OverflowError as error:
        raise InvalidRequestError(f"lora: the scale {scale!r} is out of float32's range.", param="lora") from error


def merge_uses(uses: Sequence[AdapterUse]) -> list[tuple[str, float]]:
    """(version, float32 scale) of every version used, sorted; the scales of a version used twice are added."""
    scales: dict[str, list[float]] = {}
    for use in uses:
        assert use.entry.loaded, "the version is known once prepare() has said True"
        scales.setdefault(use.entry.version, []).append(use.scale)
    return [(version, to_float32(math.fsum(parts))) for version, parts in sorted(scales.items())]
