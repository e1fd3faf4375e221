"""The engines that can be measured, one file each; an engine's own package is imported only when it is asked for."""

from __future__ import annotations

import gc
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

NAMES = ("specserve", "vllm", "sglang", "transformers")


@dataclass(frozen=True, slots=True)
class Mode:
    """`lora8_spec4`: eight adapters in turn over the requests, four drafts a round (None: "auto", the engine's choice).

    No adapters are loaded with lora0, and no draft model with spec0.
    """

    loras: int
    drafts: int | None

    @classmethod
    def parse(cls, text: str) -> Mode:
        found = re.fullmatch(r"lora(\d+)_spec(\d+|auto)", text)
        if found is None:
            raise SystemExit(f"Mode {text!r} is not of the form lora8_spec4 or lora0_specauto.")
        return cls(int(found[1]), None if found[2] == "auto" else int(found[2]))

    def __str__(self) -> str:
        return f"lora{self.loras}_spec{'auto' if self.drafts is None else self.drafts}"

    @property
    def speculates(self) -> bool:
        return self.drafts != 0

    def adapters(self, batch: int) -> list[str | None]:
        """Each request's adapter, by name."""
        return [f"a{index % self.loras}" if self.loras else None for index in range(batch)]


class Assigned(Protocol):
    """Which request of a batch gets which adapter: a Mode's in turn, or a mix (benchmarks/adapter_mixes.py)."""

    def adapters(self, batch: int) -> list[str | None]: ...


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is opened with. `options` go to the engine as they are, over what its file sets."""

    pair: Path
    mode: Mode
    device: str
    dtype: str
    collection: str = "lora"  # the pair's folder with the adapters a0, a1 …
    max_model_len: int = 4096
    max_num_seqs: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loras(self) -> dict[str, Path]:
        return {f"a{index}": self.pair / self.collection / f"a{index}" for index in range(self.mode.loras)}


class Engine(Protocol):
    """Generates greedily, ignoring end of text; the prefix cache is off."""

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], out: int) -> list[list[int]]:
        """`out` new tokens for each prompt, all at once."""
        ...

    def facts(self) -> dict[str, object]:
        """What the engine says about itself and the runs since the last call; goes into the result's row."""
        ...

    def close(self) -> None: ...


def open_engine(name: str, setup: Setup) -> Engine:
    """Load the engine; it is ready when this returns."""
    return cast(Engine, importlib.import_module(f"benchmarks.engines.{name}").open_engine(setup))


def release_memory() -> None:
    """Give back what a closed engine held, so that the next one finds the device empty."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
