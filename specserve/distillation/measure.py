"""How often drafts are accepted on held-out texts: from the models' distributions, and as the engine counts it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.core.seeds import derive_seed
from specserve.distillation.engines import device_of, engine, release_memory
from specserve.distillation.models import Batch, continuation_logits, load_base, with_adapters
from specserve.distillation.ratios import Ratio, ratio
from specserve.distillation.samples import NAME, Sample
from specserve.distillation.settings import Job
from specserve.llm import LLM, Output

NUM_DRAFTS = 4  # a round, in the engine
TEXTS_A_BATCH = 4
BASE = "base draft"  # the draft model without a companion

Companions = dict[str, Path | None]  # what drafts are called → the companion's folder, or None


class Counted(msgspec.Struct, frozen=True):
    """What the engine counted: shares of drafted tokens accepted, and tokens that a round gave. Errors are one standard
    error, None where all texts have one prompt."""

    accepted: float
    first_accepted: float  # of each round's first draft
    tokens_per_round: float
    accepted_error: float | None
    tokens_per_round_error: float | None


class Acceptance(msgspec.Struct, frozen=True):
    """Of one companion, a mean over the held-out texts' tokens.

    `alpha` is what rejection sampling accepts at the temperature, Σ min(p, q) (Leviathan et al. 2023, theorem 3.5);
    `greedy` how often both models' likeliest tokens are the same. Each with its standard error (`Ratio`).
    """

    alpha: float
    alpha_error: float | None
    greedy: float
    greedy_error: float | None
    sampled_engine: Counted
    greedy_engine: Counted


def measure(job: Job, held_out: Sequence[Sample], companions: Companions, place: Path) -> dict[str, Acceptance]:
    """Acceptance with each companion. `place` is a folder for the engine's adapters; what is there is replaced."""
    shares = _distributions(job, held_out, companions)
    release_memory()
    counts = _engine_counts(job, [opening(sample) for sample in held_out], companions, place)
    return {name: Acceptance(*shares[name][0], *shares[name][1], *counts[name]) for name in companions}


def opening(sample: Sample) -> list[int]:
    """What the engine continues: the prompt, or half of the text where that is a beginning without words, for then
    all greedy texts would be one."""
    words = [] if len(sample.prompt_ids) > 1 else sample.token_ids[: len(sample.token_ids) // 2]
    return sample.prompt_ids + words


# --- from the distributions --------------------------------------------------------------------------------------


@torch.inference_mode()
def _distributions(job: Job, held_out: Sequence[Sample], companions: Companions) -> dict[str, tuple[Ratio, Ratio]]:
    """(alpha, greedy) of each companion."""
    teacher = with_adapters(load_base(job.model, job.settings), {NAME: job.adapter})
    draft, activate = _draft(job, companions)
    lengths = [len(text.token_ids) for text in held_out]
    sums: dict[str, list[Tensor]] = {name: [] for name in companions}  # of each text, [alpha and greedy: 2]
    for begin in range(0, len(held_out), TEXTS_A_BATCH):
        batch = Batch.of(held_out[begin : begin + TEXTS_A_BATCH], device_of(job.settings))
        wanted = continuation_logits(teacher, batch)  # [tokens, vocab]
        for name in companions:
            with activate(name):
                found = continuation_logits(draft, batch)
            tokens = torch.stack([overlap(wanted, found, job.settings.temperature), agreement(wanted, found)])
            sums[name] += [of_text.sum(1) for of_text in torch.split(tokens, lengths[begin : begin + TEXTS_A_BATCH], 1)]
    groups = [tuple(opening(text)) for text in held_out]
    both = {name: torch.stack(of_texts, 1).tolist() for name, of_texts in sums.items()}
    return {
        name: (ratio(alpha, lengths, groups), ratio(greedy, lengths, groups)) for name, (alpha, greedy) in both.items()
    }


def overlap(target: Tensor, draft: Tensor, temperature: float) -> Tensor:
    """Σ min(p, q) of each token, [tokens] float64 on the CPU; logits [tokens, vocab] float32."""
    p, q = (torch.softmax(logits / temperature, -1) for logits in (target, draft))
    return torch.minimum(p, q).sum(-1).double().cpu()


def agreement(target: Tensor, draft: Tensor) -> Tensor:
    """1 for each token where both have the same likeliest token, else 0: [tokens] float64 on the CPU."""
    return (target.argmax(-1) == draft.argmax(-1)).double().cpu()


def _draft(job: Job, companions: Companions) -> tuple[Any, Callable[[str], AbstractContextManager[None]]]:
    """The draft model with all companions, and a context in which one of them is at work."""
    base = load_base(job.draft_model, job.settings)
    folders = {name.replace(" ", "_"): folder for name, folder in companions.items() if folder is not None}
    if not folders:
        return base, lambda _: nullcontext()
    model = with_adapters(base, folders)

    def activate(name: str) -> AbstractContextManager[None]:
        if companions[name] is None:
            disabled: AbstractContextManager[None] = model.disable_adapter()
            return disabled
        model.set_adapter(name.replace(" ", "_"))
        return nullcontext()

    return model, activate


# --- in the engine -----------------------------------------------------------------------------------------------


def _engine_counts(
    job: Job, prompts: Sequence[list[int]], companions: Companions, place: Path
) -> dict[str, tuple[Counted, Counted]]:
    """What the engine counts (sampled, greedy) on these prompts with each companion."""
    adapters = {
        name: dressed(job.adapter, folder, place / str(n)) for n, (name, folder) in enumerate(companions.items())
    }
    counts: dict[str, tuple[Counted, Counted]] = {}
    with engine(job, job.draft_model, adapters) as llm:
        for name in companions:
            sampled = _generate(job, llm, prompts, name, job.settings.temperature)
            counts[name] = (sampled, _generate(job, llm, prompts, name, 0.0))
    return counts


def dressed(adapter: Path, companion: Path | None, folder: Path) -> Path:
    """Make `folder` hold the adapter's files and this companion or none, by links."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).symlink_to((adapter / file).resolve())
    if companion is not None:
        (folder / "draft").symlink_to(companion.resolve(), target_is_directory=True)
    return folder


def _generate(job: Job, llm: LLM, prompts: Sequence[list[int]], name: str, temperature: float) -> Counted:
    speculation = SpeculationParams(num_draft_tokens=NUM_DRAFTS, method="rejection", proposer="draft_model")
    params = [
        SamplingParams(
            temperature=temperature, max_tokens=job.settings.max_new_tokens, speculation=speculation,
            seed=derive_seed(job.settings.seed, 1 + place),
        )
        for place in range(len(prompts))
    ]  # fmt: skip
    return counted(llm.generate(prompts, params, lora=name), [tuple(prompt) for prompt in prompts])


def counted(outputs: Sequence[Output], groups: Sequence[Hashable] | None = None) -> Counted:
    """Add up what requests were told of their drafts. Those of an equal group are no independent draws (`ratio`); by
    default each is its own."""
    stats = [output.speculation for output in outputs]
    groups = range(len(stats)) if groups is None else groups
    accepted, rounds = [one.accepted for one in stats], [one.rounds for one in stats]
    first = [one.accepted_per_position[0] if one.accepted_per_position else 0 for one in stats]
    share = ratio(accepted, [one.drafted for one in stats], groups)
    longest = max((len(one.drafted_per_position) for one in stats), default=0)
    a_round = ratio(accepted, rounds, groups, most=longest)
    return Counted(share.value, ratio(first, rounds, groups).value, 1 + a_round.value, share.error, a_round.error)
