"""What `specserve adapters distill` is told, and what follows from it before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from specserve.config import ADAPTER_FILES, DEMO_ROOT, EngineConfig, missing_file, resolve_paths
from specserve.core.errors import AdapterError, InvalidRequestError, NotFoundError


class DistillSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One companion's making. Lengths are in tokens."""

    name: str
    adapter: str | None = None  # its PEFT folder; None: the bundled adapter of that name
    prompts: str | None = None  # JSONL of "prompt" or "messages"; None: texts from their very beginning
    output: str | None = None  # None: the adapter's subfolder draft/
    work: str | None = None  # None: a hidden folder beside the output, removed at the end
    model: str = "demo"
    draft_model: str | None = None
    samples: int = 1024  # texts that the target writes with the adapter
    max_new_tokens: int = 192  # a text
    temperature: float = 0.8
    rank: int = 16
    steps: int = 600
    batch_size: int = 16  # texts a step
    learning_rate: float = 1e-3  # drafts of a few million parameters learn faster at 5e-3
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    force: bool = False

    def validate(self) -> None:
        """Raise InvalidRequestError naming the first flag that is out of range."""
        for field, ok, want in (
            ("samples", self.samples >= 4, "at least 4: some are held out to measure on"),
            ("max_new_tokens", self.max_new_tokens >= 2, "at least 2"),
            ("temperature", 0.0 < self.temperature <= 2.0, "above 0 and at most 2; greedy acceptance is measured too"),
            ("rank", self.rank >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0.0, "above 0"),
        ):
            if not ok:
                flag = "--" + field.replace("_", "-")
                raise InvalidRequestError(f"{flag} must be {want}; got {getattr(self, field)}.", param=field)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Settings with every folder found."""

    settings: DistillSettings
    model: str
    draft_model: str
    adapter: Path
    companion: Path | None  # the one that the adapter has now
    output: Path
    work: Path


def resolve(settings: DistillSettings) -> Job:
    """Find the folders. Raises InvalidRequestError, NotFoundError (no such bundled adapter) or AdapterError."""
    settings.validate()
    if settings.prompts is not None and not Path(settings.prompts).is_file():
        raise InvalidRequestError(f"--prompts {settings.prompts} is no file.", param="prompts")
    config = resolve_paths(EngineConfig(model=settings.model, draft_model=settings.draft_model))
    if config.draft_model is None:
        raise InvalidRequestError("--draft-model is missing: a companion is a LoRA for it.", param="draft_model")
    adapter = _adapter_folder(settings, dict(config.loras))
    output = Path(settings.output) if settings.output is not None else adapter / "draft"
    if output.resolve().is_relative_to(DEMO_ROOT.resolve()):
        raise InvalidRequestError(
            "The bundled adapters are left as they are: name a folder for the companion with --output.", param="output"
        )
    work = Path(settings.work) if settings.work is not None else output.parent / f".{output.name}.distill"
    companion = next((path for path in (output, adapter / "draft") if missing_file(str(path)) is None), None)
    return Job(
        settings=settings, model=config.model, draft_model=config.draft_model, adapter=adapter, companion=companion,
        output=output, work=work,
    )  # fmt: skip


def _adapter_folder(settings: DistillSettings, bundled: dict[str, str]) -> Path:
    path = settings.adapter or bundled.get(settings.name)
    if path is None:
        known = f" Bundled are {', '.join(sorted(bundled))}." if bundled else ""
        raise NotFoundError(
            f"No adapter {settings.name!r} is bundled: name its folder with --adapter PATH.{known}", param="adapter"
        )
    missing = missing_file(path)
    if missing is not None:
        raise AdapterError(
            f"--adapter {path} has no {missing}; a PEFT folder holds {' and '.join(ADAPTER_FILES)}.", param="adapter"
        )
    return Path(path)
