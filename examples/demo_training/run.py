"""What every stage is given: folders, settings, device; and a clock whose readings go into the model card."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .data import Windows
from .settings import AdapterPlan, Settings


@dataclass(frozen=True)
class Run:
    """Where a run keeps its things. `work` holds what only training needs; `out` what is shipped."""

    out: Path
    work: Path
    settings: Settings
    device: str
    tiny: bool

    def adapter_folder(self, plan: AdapterPlan) -> Path:
        """Folder of the adapter; its draft companion lies in the subfolder `draft`."""
        return self.out / plan.bundled_as / plan.name

    def windows(self) -> Windows:
        """Return the token arrays on the training device."""
        return Windows(self.work / "tokens.npz", self.device)


@contextmanager
def timed(run: Run, stage: str) -> Iterator[dict[str, float]]:
    """Add the seconds that `stage` takes, and what it notes in the yielded dict, to `times.json`."""
    began, note = time.monotonic(), dict[str, float]()
    yield note
    path = run.work / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    entry = {"seconds": round(time.monotonic() - began, 1)} | note
    path.write_text(json.dumps(times | {stage: entry}, indent=1))
