"""Texts that the target writes with the adapter, sampled by the engine and kept as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from specserve.core.sampling_params import SamplingParams
from specserve.core.seeds import derive_seed
from specserve.distillation.engines import engine
from specserve.distillation.settings import Job
from specserve.distillation.work import WorkFolder
from specserve.llm import LLM

TEXTS_AT_ONCE = 128  # between two writes of the file
NAME = "distilled"  # of the adapter, in engines of our own


class Sample(msgspec.Struct, frozen=True):
    """One text; `token_ids` ends with the token that ended it, if one did."""

    prompt_ids: list[int]
    token_ids: list[int]


def write_samples(job: Job, work: WorkFolder, parts: dict[str, list[list[int]]]) -> dict[str, list[Sample]]:
    """A text for each prompt of each part ("train", "held_out"), in order. What an earlier run wrote is kept."""
    files = {part: work.samples / f"{part}.jsonl" for part in parts}
    found = {part: _read(file) for part, file in files.items()}
    missing = sum(len(prompts) - len(found[part]) for part, prompts in parts.items())
    if not missing:
        return found
    # disable=None: shown on a terminal alone.
    with (
        engine(job, None, {NAME: job.adapter}) as llm,
        tqdm(desc="Sampling", total=missing, unit="text", disable=None, leave=False) as bar,
    ):
        for part, prompts in parts.items():
            salt = derive_seed(job.settings.seed, 1 + list(parts).index(part))  # no part repeats another's texts
            while len(found[part]) < len(prompts):
                begin = len(found[part])
                chunk = _sample(job, llm, prompts[begin : begin + TEXTS_AT_ONCE], salt, begin)
                _append(files[part], chunk)
                found[part] += chunk
                bar.update(len(chunk))
    return found


def _sample(job: Job, llm: LLM, prompts: Sequence[list[int]], seed: int, begin: int) -> list[Sample]:
    """Each text has a seed of its own, so that it is the same whichever run writes it."""
    settings = job.settings
    params = [
        SamplingParams(
            temperature=settings.temperature, max_tokens=settings.max_new_tokens, min_tokens=1,
            seed=derive_seed(seed, 1 + begin + place),
        )
        for place in range(len(prompts))
    ]  # fmt: skip
    outputs = llm.generate(prompts, params, lora=NAME)
    return [
        Sample(prompt, [*output.token_ids, *([] if output.stop_token_id is None else [output.stop_token_id])])
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _read(path: Path) -> list[Sample]:
    """The texts of the file; a last line that was cut off by a kill is taken out of it."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [msgspec.json.decode(line, type=Sample) for line in whole.splitlines()]


def _append(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))
