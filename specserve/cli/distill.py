"""`specserve adapters distill NAME`: make an adapter's draft companion."""

from __future__ import annotations

import argparse
import sys

from specserve.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED
from specserve.cli.flags import add_flags, from_flags
from specserve.core.errors import SpecserveError
from specserve.distillation.settings import DistillSettings, resolve

HELP = {
    "adapter": "its PEFT folder; default: the bundled adapter of that name",
    "prompts": 'JSONL of prompts like those served: {"prompt": …} or {"messages": …}; default: the beginning of a text',
    "model": "the target: folder, hub id or demo",
    "draft_model": "the draft model that the companion is for",
    "output": "folder of the companion; default: the adapter's subfolder draft/",
    "work": "folder for texts and checkpoints; default: a hidden one beside the output, removed at the end",
    "samples": "texts that the target writes with the adapter",
    "max_new_tokens": "tokens a text",
    "temperature": "of the texts, and of the acceptance that decides",
    "rank": "of the companion",
    "steps": "of training",
    "batch_size": "texts a step",
    "learning_rate": "of AdamW, at its height; 0.005 suits drafts of a few million parameters",
    "seed": "of texts and training",
    "device": "auto, cpu, cuda, cuda:1, …",
    "dtype": "of the models' weights; auto: bfloat16 on a GPU, float32 on a CPU",
    "force": "store it even if drafts are accepted less often than before",
}


def add_distill(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "make an adapter's draft companion: a LoRA for the draft model, trained on what the target writes"
    parser = actions.add_parser(
        "distill",
        help=text,
        description=text[0].upper() + text[1:] + ". An interrupted run goes on where it stopped; a companion that "
        "would be accepted less often than what the adapter has is not stored.",
    )
    parser.add_argument("name", metavar="NAME", help="the adapter")
    add_flags(parser, DistillSettings, HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Distill and print the report; 1 if nothing was stored, with a sentence that says why."""
    settings = from_flags(DistillSettings, args)
    try:
        job = resolve(settings)
    except SpecserveError as error:
        return _failed(str(error))
    try:
        from specserve.distillation.distill import distill  # noqa: PLC0415  peft and transformers' models

        report = distill(settings)
    except SpecserveError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        _failed(f"interrupted; the same command goes on where this stopped. What is done is kept in {job.work}.")
        return EXIT_INTERRUPTED
    print(report.text())
    return 0 if report.stored is not None else EXIT_FAILED


def _failed(message: str) -> int:
    print(f"specserve: {message}", file=sys.stderr)
    return EXIT_FAILED
