"""Prompts from files, and which of them are held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specserve.config import DEMO_ROOT
from specserve.core.errors import InvalidRequestError
from specserve.distillation.prompts import read_prompts, share_out, text_beginning
from specserve.engine.client.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "list all users"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(DEMO_ROOT / "target"))


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_each_kind_of_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        *({"prompt": "SELECT 1"}, "", {"prompt": [5, 6], "more": 1}, {"messages": MESSAGES}, {"prompt": "SELECT 1"}),
    )
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in read_prompts(path, tokenizer)] == [
        "SELECT 1", tokenizer.decode([5, 6], skip_special_tokens=False),
        "<|bos|><|user|>list all users<|end|><|assistant|>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ({"prompt": 3}, "line 2"),
        ({}, 'one of "prompt" and "messages"'),
        ({"prompt": "a", "messages": MESSAGES}, 'one of "prompt" and "messages"'),
    ],
)
def test_bad_lines_are_named(line: object, said: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "fine"}, line), tokenizer)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.jsonl", {"prompt": [1, 2]}), None) == [[1, 2]]
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "text"}), None)


def test_held_out_prompts_are_not_trained_on() -> None:
    prompts = [[number] for number in range(25)] + [[0] * 9]
    shared = share_out(prompts, 40, longest=8)
    assert (len(shared.train), len(shared.held_out), shared.too_long) == (36, 4, 1)
    train, held_out = ({tuple(ids) for ids in part} for part in (shared.train, shared.held_out))
    assert train.isdisjoint(held_out)
    assert len(train | held_out) == 25


@pytest.mark.parametrize(
    ("prompts", "said"), [([], "--prompts holds no prompt"), ([[0] * 9], "at most 8 tokens.*--max-new-tokens")]
)
def test_no_prompt_that_can_be_used(prompts: list[list[int]], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        share_out(prompts, 40, longest=8)


def test_texts_from_their_beginning(tokenizer: Tokenizer) -> None:
    shared = share_out(text_beginning(str(DEMO_ROOT / "target")), 20, longest=8)
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in shared.train] == ["<|bos|>"] * 18
    assert len(shared.held_out) == 2
