"""What the stored weights do on held-out files: losses, draft acceptance, and answers to look at."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .data import Windows
from .generation import generate

PROMPT_LENGTHS = (64, 96, 128)


@dataclass(frozen=True)
class Acceptance:
    """Greedy speculation of k tokens a round. `distinct` is the share of distinct 4-grams in what was generated."""

    first: float  # share of rounds whose first draft token is the target's
    tokens_per_round: float  # accepted drafts plus the target's own token
    rounds: int
    prompts: int
    distinct: float


@torch.no_grad()
def loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats over windows [rows, length]."""
    total = 0.0
    for ids in torch.split(windows, 16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


def prompts_of(windows: Windows, mixture: dict[str, float], count: int) -> list[torch.Tensor]:
    """Return batches of held-out prompts, one batch a prompt length, with domains in the mixture's proportions."""
    batches = []
    for index, length in enumerate(PROMPT_LENGTHS):
        parts = []
        for name, share in mixture.items():
            rows = max(1, round(share * count / len(PROMPT_LENGTHS)))
            # One spacing more for each length, so that prompts of different lengths start at different places.
            parts.append(windows.held_out(name, rows + index, length)[:rows])
        batches.append(torch.cat(parts))
    return batches


def written(target: nn.Module, prompts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Continue every batch of prompts greedily with the target."""
    return [generate(target, batch, count) for batch in prompts]


@torch.no_grad()
def acceptance(draft: nn.Module, texts: list[torch.Tensor], new_tokens: int, ends: list[int], k: int = 4) -> Acceptance:
    """Replay speculative rounds of `k` greedy draft tokens over the target's greedy continuations.

    A draft token counts only while all before it in its round matched, and then its prefix is the target's own text:
    so one forward over that text gives every draft token that could count, and the replay is exact, not an estimate.
    """
    firsts = emitted = rounds = rows = distinct = fourgrams = 0
    for ids in texts:
        start = ids.shape[1] - new_tokens
        guesses = draft(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        for matches, row in zip((guesses == ids[:, 1:])[:, start - 1 :].tolist(), ids[:, start:].tolist(), strict=True):
            length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
            grams = [tuple(row[index : index + 4]) for index in range(length - 3)]
            distinct, fourgrams, rows, position = distinct + len(set(grams)), fourgrams + len(grams), rows + 1, 0
            while position + k < length:
                ahead = matches[position : position + k]
                accepted = ahead.index(False) if False in ahead else k
                firsts, emitted, rounds = firsts + ahead[0], emitted + accepted + 1, rounds + 1
                position += accepted + 1
    rounds_or_one = max(rounds, 1)
    return Acceptance(firsts / rounds_or_one, emitted / rounds_or_one, rounds, rows, distinct / max(fourgrams, 1))


def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, request: str, new_tokens: int = 120) -> str:
    """Return the model's greedy answer to a chat request."""
    message = [{"role": "user", "content": request}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]], device=device)
    row = generate(model, prompt, new_tokens)[0, prompt.shape[1] :].tolist()
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    length = next((index for index, token in enumerate(row) if token in ends), len(row))
    return str(tokenizer.decode(row[:length])).strip()
