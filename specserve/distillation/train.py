"""The companion's training: forward KL from the teacher, AdamW, a cosine; checkpoints that change nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from specserve.core.errors import InvalidRequestError
from specserve.distillation.engines import device_of
from specserve.distillation.models import Batch, continuation_logits, new_companion, stored_dtype
from specserve.distillation.samples import Sample
from specserve.distillation.settings import DistillSettings, Job
from specserve.distillation.teacher import Teaching
from specserve.distillation.work import WorkFolder, written_whole

STEPS_A_CHECKPOINT = 50
WARMUP_SHARE = 0.05
LAST_RATE = 0.02  # of the learning rate, at the end of the cosine
TINY = 1e-6  # probability: below float32's resolution of 1 - x


def forward_kl(logits: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """KL(teacher || student), a token's mean, over the teacher's k likeliest tokens and all others as one outcome.

    `logits` [tokens, vocab] float32 are the student's; `token_ids` and `logprobs` [tokens, k] the teacher's. By the
    log-sum inequality it bounds the whole vocabulary's KL from below, and with k = vocab it is that KL.
    """
    student = logits.log_softmax(-1).gather(1, token_ids)  # [tokens, k]
    likely = (logprobs.exp() * (logprobs - student)).sum(1)
    teacher_rest = (1 - logprobs.exp().sum(1)).clamp_min(0)
    student_rest = (1 - student.exp().sum(1)).clamp_min(TINY)
    rest = torch.xlogy(teacher_rest, teacher_rest) - teacher_rest * student_rest.log()
    return (likely + rest).mean()


def train(job: Job, work: WorkFolder, samples: Sequence[Sample], teaching: Teaching) -> Path:
    """Train the companion, from the last checkpoint on if there is one; its PEFT folder, in the work folder."""
    if (work.companion / "adapter_model.safetensors").exists():
        return work.companion
    settings, device = job.settings, device_of(job.settings)
    model = new_companion(job).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint = work.training / "checkpoint.pt"
    begin = _restore(checkpoint, model, optimizer)
    with tqdm(
        desc="Training", total=settings.steps, initial=begin, unit="step", disable=None, leave=False, smoothing=0.1
    ) as bar:
        for step in range(begin, settings.steps):
            texts = _texts_of(step, len(samples), settings)
            batch = Batch.of([samples[text] for text in texts], device)
            loss = forward_kl(continuation_logits(model, batch), *teaching.of(texts, device))
            _update(loss, trained, optimizer, _rate(step, settings))
            if (step + 1) % STEPS_A_CHECKPOINT == 0 or step + 1 == settings.steps:
                _check(loss, trained, step + 1)
                _save_checkpoint(checkpoint, model, optimizer, step + 1)
                bar.set_postfix_str(f"KL {loss.item():.3f}", refresh=False)
            bar.update()
    _save_companion(job, model, work.companion)
    return work.companion


def _texts_of(step: int, count: int, settings: DistillSettings) -> list[int]:
    """The texts of a step: a function of its number alone, so that a resumed run reads what an undisturbed one does.

    Each pass over the texts has an order of its own.
    """
    chosen: list[int] = []
    order: list[int] = []
    for place in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        turn, index = divmod(place, count)
        if not order or index == 0:
            generator = torch.Generator().manual_seed(settings.seed + turn)
            order = torch.randperm(count, generator=generator).tolist()
        chosen.append(order[index])
    return chosen


def _rate(step: int, settings: DistillSettings) -> float:
    """A linear warm-up, then a cosine."""
    warmup = max(1.0, WARMUP_SHARE * settings.steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * min(1.0, (step + 1) / warmup) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def _update(loss: Tensor, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _check(loss: Tensor, trained: list[nn.Parameter], step: int) -> None:
    """Weights that are no numbers are neither kept nor gone on with. Raises InvalidRequestError."""
    if not loss.isfinite() or not all(parameter.isfinite().all() for parameter in trained):
        raise InvalidRequestError(
            f"Training diverged before step {step}: the loss or a weight is not a finite number. "
            "Lower --learning-rate; the texts and what the target said of them are kept.",
            param="learning_rate",
        )


def _save_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"step": step, "lora": _lora(model), "optimizer": optimizer.state_dict()}
    with written_whole(path) as beside:
        torch.save(state, beside)


def _restore(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    set_peft_model_state_dict(model, state["lora"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save_companion(job: Job, model: Any, folder: Path) -> None:
    """A PEFT folder in the precision of the draft model's own; the weights go last, they mean "done"."""
    folder.mkdir(exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = job.settings.draft_model or job.settings.model, True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    stored = stored_dtype(job.draft_model)
    state = {name: tensor.to(stored).cpu().contiguous() for name, tensor in _lora(model).items()}
    with written_whole(folder / "adapter_model.safetensors") as path:
        path.write_bytes(save(state, metadata={"format": "pt"}))  # unlike save_file, with the modes of other files


def _lora(model: Any) -> dict[str, Tensor]:
    # Left to itself, peft asks the hub whether the vocabulary grew.
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
