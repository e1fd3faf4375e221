"""From an adapter to its companion: sample, ask the teacher, train, measure, store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from specserve.core.errors import InvalidRequestError
from specserve.distillation.engines import release_memory
from specserve.distillation.measure import BASE, Companions, measure
from specserve.distillation.models import check_pair
from specserve.distillation.prompts import Prompts, read_prompts, share_out, text_beginning
from specserve.distillation.report import Report
from specserve.distillation.samples import write_samples
from specserve.distillation.settings import DistillSettings, Job, resolve
from specserve.distillation.teacher import teach
from specserve.distillation.train import train
from specserve.distillation.work import WorkFolder, store_companion, work_folder
from specserve.llm import load_tokenizer


def distill(settings: DistillSettings) -> Report:
    """Make a companion and store it where it is accepted at least as often as what drafted before.

    Called again after an interrupt it goes on where it stopped. Raises SpecserveError for what a user can change.
    """
    job = resolve(settings)
    with work_folder(job) as work:
        report = _distill(job, work)
        if report.stored is not None and settings.work is None:
            shutil.rmtree(work.root)
    return report


def _distill(job: Job, work: WorkFolder) -> Report:
    seconds: dict[str, float] = {}
    prompts = _prompts(job)
    with _timed(seconds, "sampling"):
        samples = write_samples(job, work, {"train": prompts.train, "held_out": prompts.held_out})
    with _timed(seconds, "teacher"):
        teaching = teach(job, work, samples["train"])
    with _timed(seconds, "training"):
        companion = train(job, work, samples["train"], teaching)
    companions: Companions = {BASE: None, "before": job.companion, "after": companion}
    if job.companion is None:
        del companions["before"]
    with _timed(seconds, "measuring"):
        acceptance = measure(job, samples["held_out"], companions, work.root / "measured")
    report = Report(
        name=job.settings.name, acceptance=acceptance, stored=job.output, work=work.root,
        temperature=job.settings.temperature, num_texts=len(samples["train"]), num_tokens=int(teaching.starts[-1]),
        num_held_out=len(samples["held_out"]), too_long=prompts.too_long, seconds=seconds,
    )  # fmt: skip
    if report.gain < 0 and not job.settings.force:
        return replace(report, stored=None)
    store_companion(companion, job.output)
    return report


def _prompts(job: Job) -> Prompts:
    settings = job.settings
    context = check_pair(job)
    if settings.max_new_tokens >= context:
        raise InvalidRequestError(
            f"--max-new-tokens must be below the models' context of {context} tokens; got {settings.max_new_tokens}.",
            param="max_new_tokens",
        )
    found = (
        text_beginning(job.model)
        if settings.prompts is None
        else read_prompts(settings.prompts, load_tokenizer(job.model))
    )
    return share_out(found, settings.samples, context - settings.max_new_tokens)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long it took, and give its memory back."""
    begin = time.perf_counter()
    yield
    release_memory()
    seconds[stage] = time.perf_counter() - begin
