"""One training loop, and the two losses that use it: next token, and distillation from a teacher."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from .settings import Budget

Batches = Iterator[torch.Tensor]
Loss = Callable[[torch.Tensor], torch.Tensor]


def fit(model: nn.Module, batches: Batches, loss_of: Loss, budget: Budget, label: str, decay: float = 0.1) -> int:
    """Train the parameters that require gradients with AdamW and a cosine schedule; return the steps made.

    Progress is the larger of steps and seconds used, so that a slower machine still ends its cosine at zero.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(_groups(trained, decay), lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")
    began, smoothed = time.monotonic(), torch.zeros((), device=device)
    step = 0
    while (progress := max(step / budget.steps, (time.monotonic() - began) / budget.seconds)) < 1:
        rate = budget.learning_rate * min(1.0, (step + 1) / budget.warmup) * (0.02 + 0.98 * _cosine(progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smoothed = loss.detach() if step == 0 else 0.95 * smoothed + 0.05 * loss.detach()
        if step % 200 == 0:  # reading the loss waits for the device, and so keeps the clock honest
            print(f"  {label}: step {step}, {time.monotonic() - began:.0f} s, loss {smoothed.item():.3f}", flush=True)
        elif step % 8 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        step += 1
    print(f"  {label}: {step} steps in {time.monotonic() - began:.0f} s, loss {smoothed.item():.3f}", flush=True)
    return step


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _groups(parameters: list[nn.Parameter], decay: float) -> list[dict[str, object]]:
    """Decay matrices only: decaying a norm's gain pulls it away from one for no reason."""
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]


def next_token_loss(model: nn.Module) -> Loss:
    """Cross-entropy of every next token of a window [rows, length]."""

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss_of


def distillation_loss(student: nn.Module, teacher: nn.Module, hard: float) -> Loss:
    """KL(teacher || student) at every position, mixed with the cross-entropy on the teacher's best token.

    The hard part is what greedy acceptance counts; the soft part carries what the draft cannot learn from one label.
    """

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        found = F.log_softmax(logits, -1)
        soft = F.kl_div(found, F.log_softmax(wanted, -1), log_target=True, reduction="batchmean")
        return (1 - hard) * soft + hard * F.nll_loss(found, wanted.argmax(-1))

    return loss_of
