"""What a comparison leaves in its folder while it runs: each run at its end, so that nothing takes it away again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from specserve.bench.facts import append_line
from specserve.bench.lines import read_lines
from specserve.bench.records import Comparison, RunRecord, VariantInfo
from specserve.bench.variants import Variant
from specserve.core.errors import InvalidRequestError

RUNS, ABOUT = "runs.jsonl", "about.json"  # a RunRecord a line; a Comparison without its runs


class Kept:
    """Runs, variants and facts as they come, in memory and in the folder. `facts["notes"]` are sentences that a reader
    of the result must see."""

    def __init__(self, variants: Sequence[Variant], folder: Path, facts: dict[str, Any]) -> None:
        self._infos = {one.name: VariantInfo(one.name, one.title, list(one.command), one.url) for one in variants}
        self._runs: list[RunRecord] = []
        self._facts = {**facts, "notes": []}
        self._folder = folder
        self._write()

    def add(self, run: RunRecord) -> None:
        self._runs.append(run)
        append_line(self._folder / RUNS, run)

    def fact(self, name: str, value: str) -> None:
        self._facts[name] = value
        self._write()

    def note(self, sentence: str) -> None:
        self._facts["notes"].append(sentence)
        self._write()

    def known(self, variant: str) -> bool:
        """Whether the server of a variant has told of itself."""
        return bool(self._infos[variant].server)

    def tell(self, variant: str, *, command: Sequence[str], url: str, server: dict[str, Any]) -> None:
        info = self._infos[variant]
        self._infos[variant] = msgspec.structs.replace(info, command=list(command), url=url, server=server)
        self._write()

    def comparison(self) -> Comparison:
        return Comparison(list(self._infos.values()), self._runs, self._facts)

    def _write(self) -> None:
        about = Comparison(list(self._infos.values()), [], self._facts)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / ABOUT).write_bytes(msgspec.json.format(msgspec.json.encode(about)) + b"\n")


def read_comparison(folder: Path) -> Comparison:
    """What a comparison left in its folder, also one that was cut short; raises InvalidRequestError."""
    about = folder / ABOUT
    try:
        found = msgspec.json.decode(about.read_bytes(), type=Comparison)
    except OSError as error:
        raise InvalidRequestError(f"{folder} holds no comparison: {about.name}: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"{about}: {error}") from error
    path = folder / RUNS
    runs = [run for _, run in read_lines(path, RunRecord, "folder")] if path.exists() else []
    return msgspec.structs.replace(found, runs=runs)
