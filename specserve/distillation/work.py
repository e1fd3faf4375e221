"""The work folder: what a run has finished, so that the same command goes on where an interrupted one stopped.

Texts depend on fewer settings than the training does. Each part lies in a subfolder named by a hash of all that it
depends on: another learning rate finds the texts there, another adapter does not.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specserve.core.errors import AdapterBusyError
from specserve.distillation.settings import Job
from specserve_adapters.adapter_files import hash_adapter


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Where a run keeps what it made. The folders exist."""

    root: Path
    samples: Path  # texts and what the teacher says of them
    training: Path  # checkpoint and the new companion

    @property
    def companion(self) -> Path:
        """The new companion, before it is stored."""
        return self.training / "companion"


@contextmanager
def work_folder(job: Job) -> Iterator[WorkFolder]:
    """The run's work folder, for it alone. Raises AdapterBusyError while another run is in it."""
    settings = job.settings
    texts = _key(
        _model_identity(job.model), hash_adapter(job.adapter, None), _prompts_identity(settings.prompts),
        settings.samples, settings.max_new_tokens, settings.temperature, settings.seed, settings.dtype,
        _context_identity(job.draft_model),
    )  # fmt: skip
    training = _key(
        texts, _model_identity(job.draft_model), settings.rank, settings.steps, settings.batch_size,
        settings.learning_rate,
    )  # fmt: skip
    work = WorkFolder(job.work, job.work / f"samples-{texts}", job.work / f"training-{training}")
    for folder in (work.samples, work.training):
        folder.mkdir(parents=True, exist_ok=True)
    with (job.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AdapterBusyError(f"Another distillation is at work in {job.work}.", param="work") from error
        yield work


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes `path`'s place at the end, so that a file is there whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    yield beside
    os.replace(beside, path)


def store_companion(source: Path, output: Path) -> None:
    """Put a copy of the folder `source` at `output`, in place of what is there.

    It is written beside and renamed. Where a folder is replaced, a run that is killed between two renames leaves the
    old one as `.NAME.old`.
    """
    beside, old = output.with_name(f".{output.name}.new"), output.with_name(f".{output.name}.old")
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, beside)
    if output.exists():
        os.rename(output, old)
    os.rename(beside, output)
    shutil.rmtree(old, ignore_errors=True)


def _key(*parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode([str(part) for part in parts])).hexdigest()[:12]


def _model_identity(model: str) -> str:
    """A folder's weights by name, size and time of change: to hash them would take as long as to read them."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{Path(model).resolve() if files else model} {found}"


def _context_identity(draft_model: str) -> str:
    """The draft's context bounds the prompts that are taken; its weights do not matter to the texts."""
    config = Path(draft_model) / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else draft_model


def _prompts_identity(prompts: str | None) -> str:
    return "" if prompts is None else hashlib.sha256(Path(prompts).read_bytes()).hexdigest()
