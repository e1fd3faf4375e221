"""The prompts that texts begin with: a user's JSONL, or the beginning of a text where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specserve.core.errors import InvalidRequestError
from specserve.engine.client.tokenizer import Tokenizer

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 64  # texts; enough for a standard error of about one percent of the acceptance


class PromptLine(msgspec.Struct, kw_only=True):
    """One line of the file; other fields are left alone."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of each text's prompt, several texts to a prompt where prompts are few. Held-out prompts are not
    trained on, nor any prompt equal to one (unless all are the beginning of a text)."""

    train: list[list[int]]
    held_out: list[list[int]]
    too_long: int = 0  # prompts left out


def read_prompts(path: str, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Token ids of every line's prompt, without repeats. Raises InvalidRequestError naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(f"--prompts {path} cannot be read: {reason}.", param="prompts") from error
    found: dict[tuple[int, ...], None] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found[tuple(_encode(line, tokenizer, f"--prompts {path}, line {number}"))] = None
    return [list(ids) for ids in found if ids]


def _encode(line: str, tokenizer: Tokenizer | None, where: str) -> list[int]:
    try:
        given = msgspec.json.decode(line, type=PromptLine)
        if (given.prompt is None) == (given.messages is None):
            raise InvalidRequestError('it must hold one of "prompt" and "messages".')
        if isinstance(given.prompt, list):
            return given.prompt
        if tokenizer is None:
            raise InvalidRequestError('the model has no tokenizer, so "prompt" must be a list of token ids.')
        if given.prompt is not None:
            return tokenizer.encode(given.prompt)
        text = tokenizer.render_chat(given.messages or [], add_generation_prompt=True, template_args={})
        return tokenizer.encode(text, add_special_tokens=False)
    except (msgspec.DecodeError, InvalidRequestError) as error:
        raise InvalidRequestError(f"{where}: {error}", param="prompts") from error


def text_beginning(model: str) -> list[list[int]]:
    """The beginning-of-text token as the only prompt: the adapter then writes what it was trained on."""
    from transformers import AutoTokenizer  # noqa: PLC0415  slow

    bos = AutoTokenizer.from_pretrained(model).bos_token_id
    if bos is None:
        raise InvalidRequestError(
            "The model's tokenizer has no beginning-of-text token, so texts need prompts: give --prompts FILE.jsonl.",
            param="prompts",
        )
    return [[int(bos)]]


def share_out(prompts: Sequence[list[int]], samples: int, longest: int) -> Prompts:
    """Deal `samples` texts to the prompts of at most `longest` tokens, a tenth of them to held-out prompts.

    Every tenth prompt is held out, and one at least; a single prompt serves both sides.
    """
    fitting = [prompt for prompt in prompts if len(prompt) <= longest]
    if not prompts:
        raise InvalidRequestError("--prompts holds no prompt; give one a line.", param="prompts")
    if not fitting:
        raise InvalidRequestError(
            f"--prompts: none of {len(prompts)} leaves room for the text. Give some of at most {longest} tokens, or "
            "lower --max-new-tokens.",
            param="prompts",
        )
    held_out = fitting[:: round(1 / HELD_OUT_SHARE)]
    train = [prompt for place, prompt in enumerate(fitting) if place % round(1 / HELD_OUT_SHARE)] or held_out
    num_held_out = min(MOST_HELD_OUT, max(2, round(HELD_OUT_SHARE * samples)))
    return Prompts(
        _repeated(train, samples - num_held_out), _repeated(held_out, num_held_out), len(prompts) - len(fitting)
    )


def _repeated(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    return [prompts[place % len(prompts)] for place in range(count)]
