"""bad_words become token sequences before a request is queued, and are refused there if they cannot."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serverkit.tiny import make_tokenizer
from specserve.core.bad_words import MAX_TOKENS, some_token_stays
from specserve.core.errors import InvalidRequestError
from specserve.core.sampling_params import SamplingParams
from specserve.engine.client.async_engine import AsyncEngine
from specserve.engine.client.bad_words import with_word_tokens, word_sequences
from specserve.engine.client.tokenizer import Tokenizer

RAW = make_tokenizer()
TOKENIZER = Tokenizer(RAW)
VOCAB = len(RAW)


def encoded(text: str) -> tuple[int, ...]:
    return tuple(RAW.encode(text, add_special_tokens=False))


def sentencepiece_like() -> Tokenizer:
    """Puts a space before every text, as Llama 2's does."""
    pieces = ["▁", "▁bad", "bad", "▁word", "s", "<unk>"]
    raw = RawTokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=5))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


def test_each_word_with_and_without_a_space() -> None:
    found = word_sequences(["quick brown", "  fox", "fox", "日"], TOKENIZER)
    assert found == (
        encoded("quick brown"), encoded(" quick brown"), encoded("fox"), encoded(" fox"), encoded("日"), encoded(" 日")
    )  # fmt: skip
    assert len(set(map(len, found))) > 1


def test_a_tokenizer_that_puts_the_space_itself() -> None:
    (bare, *others) = word_sequences(["bad words"], sentencepiece_like())
    assert bare == (1, 3, 4)
    assert all(other[-3:] == bare for other in others), "what is forbidden anyway"


def test_special_tokens_are_words_too() -> None:
    assert (1,) in word_sequences(["</s>"], TOKENIZER)


def test_words_join_the_sequences_that_were_given() -> None:
    params = SamplingParams(bad_words=("fox",), bad_words_token_ids=((7, 8),), top_k=3)
    found = with_word_tokens(params, TOKENIZER, VOCAB)
    assert found.bad_words_token_ids == ((7, 8), encoded("fox"), encoded(" fox"))
    assert found.bad_words == () and found.top_k == 3


def test_too_long_is_counted_in_tokens() -> None:
    with_word_tokens(SamplingParams(bad_words=("\x01" * (MAX_TOKENS - 1),)), TOKENIZER, VOCAB)
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_TOKENS} tokens") as raised:
        with_word_tokens(SamplingParams(bad_words=("\x01" * 5000,)), TOKENIZER, VOCAB)
    assert raised.value.param == "bad_words"
    assert len(raised.value.message) < 200


@pytest.mark.parametrize(
    ("sequences", "stop_ids", "stays"),
    [
        ([(0,), (1,)], [], True),
        ([(0,), (1,), (2,)], [], False),
        ([(0,), (1,)], [2], False),
        ([(0, 0), (1, 1), (2, 2)], [], True),  # one at a time
        ([(0,), (5, 1), (4, 5, 2)], [], False),  # all three behind 4, 5
        ([(0,), (5, 1), (5, 4, 2)], [], True),
        ([(0,), (5, 1), (5, 4, 2)], [1], False),  # behind 5, 4 the stop token 1 besides
    ],
)
def test_some_token_stays(sequences: list[tuple[int, ...]], stop_ids: list[int], stays: bool) -> None:
    assert some_token_stays(sequences, stop_ids, 3) == stays


async def test_a_request_leaves_with_tokens(start: Callable[..., Awaitable[AsyncEngine]]) -> None:
    engine = await start()
    generation = await engine.submit([[7], "fox"], SamplingParams(max_tokens=2, n=2, bad_words=("fox", "dog")))
    for sequence in generation.sequences:
        params = sequence.request.params
        assert params.bad_words == ()
        assert params.bad_words_token_ids == tuple(map(encoded, ("fox", " fox", "dog", " dog")))
    async with generation:
        pass


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(bad_words=("",)),
        SamplingParams(bad_words=("x", "\n ")),
        SamplingParams(bad_words=("x",) * 129),
        SamplingParams(bad_words=("\x01" * 40,)),
        SamplingParams(bad_words=("fox",), bad_words_token_ids=((5,),) * 256),
    ],
)
async def test_refused_before_anything_is_queued(
    start: Callable[..., Awaitable[AsyncEngine]], params: SamplingParams
) -> None:
    engine = await start()
    with pytest.raises(InvalidRequestError) as raised:
        await engine.submit([[7]], params)
    assert raised.value.param == "bad_words"
    assert not engine.live
