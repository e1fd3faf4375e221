"""The servers that a comparison can start: by which command, on which port, with how much of a GPU's memory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from specserve.core.errors import InvalidRequestError

# What a memory flag's number is a share of. `device`: all of the device, whatever others hold of it counts as taken;
# `own`: all of the device, for this server alone; `free`: what is free when the server starts.
ShareOf = Literal["device", "own", "free"]
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Engine:
    """One kind of server. `marks`: the programs and modules that start it."""

    name: str
    marks: tuple[str, ...]
    host_flag: str = "--host"
    memory_flag: str | None = None
    share_of: ShareOf = "own"


ENGINES = (
    Engine("specserve", ("specserve", "specserve.cli.main"), "--host", "--gpu-memory-utilization", "device"),
    Engine("vllm", ("vllm", "vllm.entrypoints.openai.api_server"), "--host", "--gpu-memory-utilization", "own"),
    Engine("sglang", ("sglang", "sglang.launch_server"), "--host", "--mem-fraction-static", "free"),
    Engine("tgi", ("text-generation-launcher",), "--hostname", "--cuda-memory-fraction", "own"),
    Engine("transformers", ("transformers",)),
)


def engine_of(words: Sequence[str]) -> Engine | None:
    """Which server a command starts: `vllm serve …`, `python -m sglang.launch_server …`; None: one not known here."""
    program = words[2] if list(words[1:2]) == ["-m"] and len(words) > 2 else PurePath(words[0]).name
    return next((engine for engine in ENGINES if program in engine.marks), None)


def model_of(words: Sequence[str]) -> str | None:
    """The folder or hub id that a command serves: `… serve MODEL`, or a flag's value; None: it does not say."""
    for place, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in ("--model", "--model-path", "--model-id"):
            return value or (words[place + 1] if words[place + 1 :] else None)
    return words[2] if list(words[1:2]) == ["serve"] and words[2:] and not words[2].startswith("-") else None


def check_installed(words: Sequence[str]) -> None:
    """Raise InvalidRequestError if the command's program is not on this machine."""
    if words[0] != "specserve" and shutil.which(words[0]) is None:
        raise InvalidRequestError(
            f"{words[0]!r} is not installed here: install it, or give the URL of a server that runs (http://…)."
        )


def memory_setting(share_of: ShareOf, share: float, taken: float) -> float:
    """The number for the memory flag, so that the server gets `share` of the device beside others that hold `taken`."""
    if share_of == "device":
        return round(taken + share, 4)
    if share_of == "free":
        return round(min(share / (1.0 - taken), 1.0), 4)
    return share


def complete_command(words: Sequence[str], *, port: int, share: float, taken: float) -> list[str]:
    """The command with its port, and its share of the memory where it does not choose one itself.

    `{port}` in a word is replaced; a server that is not known here must have it.
    """
    engine = engine_of(words)
    whole = [word.replace("{port}", str(port)) for word in words]
    if engine is None:
        return whole
    if engine.name == "specserve" and words[0] == "specserve":  # this installation, whatever the PATH says
        whole[:1] = [sys.executable, "-m", "specserve.cli.main"]
    if "--port" not in words:
        whole += [engine.host_flag, HOST, "--port", str(port)]
    flag = engine.memory_flag
    if flag is not None and not any(word.split("=")[0] == flag for word in words):
        whole += [flag, str(memory_setting(engine.share_of, share, taken))]
    return whole
