"""transformers' models with peft's adapters: the teacher and the student, and texts in the batches they read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from specserve.core.errors import ModelLoadError
from specserve.distillation.engines import device_of, dtype_of
from specserve.distillation.samples import Sample
from specserve.distillation.settings import DistillSettings, Job
from specserve.loading.source import resolve_folder

ALPHA_PER_RANK = 2  # lora_alpha; what the trained update is scaled with


def check_pair(job: Job) -> int:
    """The context that both models have, in tokens. Raises ModelLoadError where the vocabularies differ."""
    target, draft = (AutoConfig.from_pretrained(resolve_folder(name)) for name in (job.model, job.draft_model))
    if target.vocab_size != draft.vocab_size:
        raise ModelLoadError(
            f"The draft model's vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}: "
            "a companion needs a draft model with the same tokenizer."
        )
    return min(int(config.max_position_embeddings) for config in (target, draft))


def stored_dtype(name: str) -> torch.dtype:
    """The precision that the model's weights are stored in; float32 where its configuration does not say."""
    dtype = AutoConfig.from_pretrained(resolve_folder(name)).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def load_base(name: str, settings: DistillSettings) -> nn.Module:
    """A model for inference on the settings' device."""
    logging.disable_progress_bar()  # stages have bars of their own
    model = AutoModelForCausalLM.from_pretrained(resolve_folder(name), dtype=dtype_of(settings))
    loaded: nn.Module = model.to(device_of(settings)).eval().requires_grad_(False)
    return loaded


def with_adapters(model: nn.Module, adapters: dict[str, Path]) -> Any:
    """A PeftModel that knows these adapters by name; the first is active."""
    first, *others = adapters
    device = str(next(model.parameters()).device)  # left to itself, peft takes a GPU where there is one
    with _quiet():
        adapted = PeftModel.from_pretrained(model, str(adapters[first]), adapter_name=first, torch_device=device)
        for name in others:
            adapted.load_adapter(str(adapters[name]), adapter_name=name, torch_device=device)
    return adapted.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what peft and transformers have to tell each other of their futures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def new_companion(job: Job) -> Any:
    """The draft model with a fresh LoRA on all its linears, which changes nothing yet."""
    torch.manual_seed(job.settings.seed)
    config = LoraConfig(
        r=job.settings.rank, lora_alpha=ALPHA_PER_RANK * job.settings.rank, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    base = load_base(job.draft_model, job.settings)
    with _quiet():
        return get_peft_model(base, config)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts, padded on the left so that all of them end together. `longest` is the longest continuation."""

    input_ids: Tensor  # [rows, length] int64
    attention_mask: Tensor  # [rows, length] int64
    position_ids: Tensor  # [rows, length] int64
    continued: Tensor  # [rows, longest] bool: whether that token, counted from the end, is of the continuation
    longest: int

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> Batch:
        """Pad on the host, then copy."""
        length = max(len(sample.prompt_ids) + len(sample.token_ids) for sample in samples)
        longest = max(len(sample.token_ids) for sample in samples)
        ids, mask = torch.zeros(len(samples), length, dtype=torch.long), torch.zeros(len(samples), length).long()
        continued = torch.zeros(len(samples), longest, dtype=torch.bool)
        for row, sample in enumerate(samples):
            tokens = sample.prompt_ids + sample.token_ids
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            mask[row, length - len(tokens) :] = 1
            continued[row, longest - len(sample.token_ids) :] = True
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return cls(ids.to(device), mask.to(device), positions.to(device), continued.to(device), longest)


def continuation_logits(model: Any, batch: Batch) -> Tensor:
    """Logits of every token of the continuations, text by text: [tokens, vocab] float32."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
        use_cache=False, logits_to_keep=batch.longest + 1,
    ).logits[:, :-1]  # fmt: skip
    return logits[batch.continued].float()  # type: ignore[no-any-return]
