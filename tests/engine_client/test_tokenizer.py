"""The tokenizer wrapper: bytes of tokens, chat templates, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverkit.tiny import make_tokenizer
from specserve.core.errors import InvalidRequestError, ModelLoadError
from specserve.engine.client.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_tokenizer())
REFERENCE = make_tokenizer()


@given(text=st.text(max_size=50))
def test_token_bytes_make_the_text(text: str) -> None:
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode(text))).decode() == text


@given(text=st.text(max_size=50))
def test_encodes_as_transformers_does(text: str) -> None:
    assert TOKENIZER.encode(text) == REFERENCE.encode(text)


def test_token_text_of_part_of_a_character() -> None:
    tokens = TOKENIZER.encode("€")
    assert [TOKENIZER.token_text(token) for token in tokens] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]


def test_special_tokens_have_their_names() -> None:
    assert TOKENIZER.token_text(1) == "</s>"


def test_truncation_of_the_training_is_off() -> None:
    raw = make_tokenizer()
    raw.backend_tokenizer.enable_truncation(3)
    assert len(Tokenizer(raw).encode("the quick brown fox jumps")) > 3


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    want = REFERENCE.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.render_chat(messages, add_generation_prompt=True, template_args={}) == want
    assert want == "<s><|user|>hi<|assistant|>"


def test_template_errors_are_the_users() -> None:
    with pytest.raises(InvalidRequestError, match="no tools here") as raised:
        TOKENIZER.render_chat([{"role": "tool", "content": "x"}], add_generation_prompt=True, template_args={})
    assert raised.value.param == "messages"


def test_template_arguments_do_not_reach_the_call() -> None:
    """`chat_template` in a request's chat_template_kwargs would be a program of the user's."""
    with pytest.raises(InvalidRequestError) as raised:
        TOKENIZER.render_chat([], add_generation_prompt=True, template_args={"chat_template": "{{ 1 }}"})
    assert raised.value.param == "chat_template_kwargs.chat_template"


def test_no_template() -> None:
    raw = make_tokenizer()
    raw.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer(raw).render_chat([{"role": "user", "content": "x"}], add_generation_prompt=True, template_args={})


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelLoadError, match="tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_unreadable_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="tokenizer"):
        Tokenizer.load(str(tmp_path))
