"""Text written by a model, many rows at once: the drafts learn from it, because it is what they will have to guess."""

import torch
from torch import nn
from transformers import DynamicCache


@torch.no_grad()
def generate(model: nn.Module, prompts: torch.Tensor, count: int, temperature: float = 0.0) -> torch.Tensor:
    """Continue prompts [rows, length] by `count` tokens, greedily or sampled; return [rows, length + count].

    Rows go on after an end-of-text token, as training windows do; measurements cut them there.
    """
    cache, ids, latest = DynamicCache(), [prompts], prompts
    for _ in range(count):
        logits = model(input_ids=latest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if temperature:
            latest = torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1)
        else:
            latest = logits.argmax(-1, keepdim=True)
        ids.append(latest)
    return torch.cat(ids, 1)
