"""The exact distribution of every token of an answer, for a model whose next token depends on the last one alone.

Raw logits are transformers' and peft's; what a request asks to be done to them is written down here once more, in plain
torch over whole texts, in vLLM's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lawbook.chi_square import p_value
from lawbook.mixes import Ask, Lora
from lawbook.oracles import peft_model
from lawbook.zoo import Zoo
from specserve.core.sampling_params import SamplingParams
from specserve.llm import Output


def transitions(zoo: Zoo, lora: Lora, vocab: int) -> Tensor:
    """Raw logits [vocab, vocab] float64 of the next token after each token."""
    with torch.inference_mode():
        logits: Tensor = peft_model(zoo, lora, torch.float64)(torch.arange(vocab).unsqueeze(1)).logits[:, 0]
    return logits.clone()


def drawn_tokens(output: Output) -> list[int]:
    """All tokens that were sampled: the stop token, which is not emitted, too."""
    return output.token_ids + ([] if output.stop_token_id is None else [output.stop_token_id])


def distributions(params: SamplingParams, logits: Tensor, text: Sequence[int]) -> Tensor:
    """What each token of `text` but the first, which is the prompt, was to be drawn from: [len(text) - 1, vocab]."""
    vocab = logits.shape[1]
    ids = torch.tensor(text)
    logits = logits[ids[:-1]]  # [L, vocab]
    generated = one_hot(ids[1:], vocab).double().cumsum(0)  # [L, vocab], the token itself among them
    counts = torch.cat((generated.new_zeros(1, vocab), generated[:-1]))
    logits[: params.min_tokens, list(params.stop_token_ids)] = float("-inf")
    for *begun, last in params.bad_words_token_ids:
        for place in range(len(begun), len(logits)):  # so many tokens were generated before
            if list(text[1 + place - len(begun) : 1 + place]) == begun:
                logits[place, last] = float("-inf")
    for token, bias in params.logit_bias.items():
        logits[:, token] += bias
    seen = (counts > 0) | one_hot(ids[0], vocab).bool()
    repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    logits = torch.where(seen, repeated, logits)
    logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return kept(params, (logits / params.temperature).softmax(-1))


def kept(params: SamplingParams, probs: Tensor) -> Tensor:
    """min_p, top_k, then top_p of what is left, token by token from the likeliest. [L, vocab] → [L, vocab]"""
    probs = probs.where(probs >= params.min_p * probs.amax(-1, keepdim=True), 0.0)
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    if params.top_k > 0:
        sorted_probs[:, params.top_k :] = 0.0
    sorted_probs /= sorted_probs.sum(-1, keepdim=True)
    before = sorted_probs.cumsum(-1) - sorted_probs
    if params.top_p < 1.0:
        sorted_probs = sorted_probs.where(before < params.top_p, 0.0)
    probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs)
    return probs / probs.sum(-1, keepdim=True)


def judged(asks: Sequence[Ask], outputs: Sequence[Output], logits: Mapping[Lora, Tensor]) -> tuple[float, int]:
    """The p-value of these answers, grouped by adapters and the token before each, and how many tokens were drawn.

    `logits`: by the adapters of each request, as `transitions` gives them.
    """
    drawn, probs, group = [], [], []
    for ask, output in zip(asks, outputs, strict=True):
        text = [*ask.prompt, *drawn_tokens(output)]
        ids = torch.tensor(text)
        drawn.append(ids[1:])
        probs.append(distributions(ask.params, logits[ask.lora], text))
        group.append(ids[:-1] + list(logits).index(ask.lora) * probs[-1].shape[1])
    tokens = torch.cat(drawn)
    return p_value(tokens, torch.cat(probs), torch.cat(group)), len(tokens)
