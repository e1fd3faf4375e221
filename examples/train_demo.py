"""Train the demo models that are bundled with specserve, from nothing: `python examples/train_demo.py --out DIR`.

It fetches a named list of permissively licensed packages (with `pip download` and `npm pack`), makes a corpus of them
and of the standard library, trains a tokenizer, a 9.5 M parameter target, a 1 M parameter draft, four LoRA adapters
and a draft companion for each, measures the stored weights and writes the model card. Stages whose files exist are
skipped, so an interrupted run goes on where it stopped. The full run wants a CUDA GPU for some minutes; `--tiny` runs
every stage on a CPU in about a minute, offline, to test this script: its models are worth nothing.
"""

import argparse
import datetime
import json
from pathlib import Path

import torch
from demo_training import card, stages
from demo_training.run import Run
from demo_training.settings import Settings, tiny


def main() -> None:
    """Run the stages up to the one asked for, in order."""
    every_stage = stages.STAGES | {"card": card.write}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and the model card")
    parser.add_argument("--work", type=Path, help="folder for corpus, tokens and logs (default: OUT/work)")
    parser.add_argument("--tiny", action="store_true", help="test run: standard library only, small models, CPU")
    parser.add_argument("--until", choices=list(every_stage), default="card", help="last stage to run")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    settings = tiny(Settings()) if options.tiny else Settings()
    run = Run(options.out, options.work or options.out / "work", settings, device, options.tiny)
    for folder in (run.out, run.work):
        folder.mkdir(parents=True, exist_ok=True)
    for name, stage in every_stage.items():
        print(f"stage {name}", flush=True)
        stage(run)
        if name == "target":
            _note_machine(run)
        if name == options.until:
            return


def _note_machine(run: Run) -> None:
    """Keep what the model card says about where and when the target was trained."""
    path = run.work / "machine.json"
    if not path.exists():
        device = torch.cuda.get_device_name() if run.device == "cuda" else "CPU"
        today = datetime.date.today().isoformat()
        path.write_text(json.dumps({"device": device, "torch": torch.__version__, "date": today}))


if __name__ == "__main__":
    main()
