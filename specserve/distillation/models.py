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
    """Texts, padded on the right, so that causal attention alone keeps what is no text out: no row of a mask is empty,
    for which fused attention kernels of a GPU give gradients that are no numbers."""

    input_ids: Tensor  # [rows, length] int64
    read: Tensor  # [width] int64: positions whose logits are read by any text, one after another
    continued: Tensor  # [rows, width] bool: whether the token behind such a position is of that text's continuation

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> Batch:
        """Pad on the host, then copy."""
        texts = [sample.prompt_ids + sample.token_ids for sample in samples]
        ids = torch.zeros(len(samples), max(map(len, texts)), dtype=torch.long)
        continued = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)  # by the position before the token
        for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            ids[row, : len(text)] = torch.tensor(text)
            continued[row, len(sample.prompt_ids) - 1 : len(text) - 1] = True
        read = torch.arange(min(len(sample.prompt_ids) for sample in samples) - 1, continued.shape[1])
        return cls(ids.to(device), read.to(device), continued[:, read].to(device))


def continuation_logits(model: Any, batch: Batch) -> Tensor:
    """Logits of every token of the continuations, text by text: [tokens, vocab] float32."""
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.read).logits  # [rows, width, vocab]
    return logits[batch.continued].float()  # type: ignore[no-any-return]
