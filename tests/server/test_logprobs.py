"""Log-probabilities at the edges of what JSON can say."""

from __future__ import annotations

import math

import msgspec

from serverkit.tiny import make_tokenizer
from specserve.core.messages import TokenLogprobs
from specserve.engine.client.sequence import Delta
from specserve.engine.client.tokenizer import Tokenizer
from specserve.server.logprobs import LOWEST, chat_logprobs, completion_logprobs

TOKENIZER = Tokenizer(make_tokenizer())


def test_probability_zero_is_a_number() -> None:
    entry = TokenLogprobs(10, -math.inf, [(11, -0.5), (12, -math.inf)])
    delta = Delta(0, "", [10], [entry], [0])
    completion = msgspec.json.decode(msgspec.json.encode(completion_logprobs(TOKENIZER, delta)))
    assert completion["token_logprobs"] == [LOWEST]
    assert sorted(completion["top_logprobs"][0].values()) == [LOWEST, LOWEST, -0.5]
    chat = msgspec.json.decode(msgspec.json.encode(chat_logprobs(TOKENIZER, delta)))
    assert chat["content"][0]["logprob"] == LOWEST
    assert [top["logprob"] for top in chat["content"][0]["top_logprobs"]] == [-0.5, LOWEST]


def test_none_asked_for_none_given() -> None:
    delta = Delta(0, "x", [10], None, [0])
    assert completion_logprobs(TOKENIZER, delta) is None
    assert chat_logprobs(TOKENIZER, delta) is None


def test_parts_of_a_character_stay_apart() -> None:
    """As plain text they would all read U+FFFD and one would hide the other."""
    first, second, third = TOKENIZER.encode("€")
    delta = Delta(0, "", [first], [TokenLogprobs(first, -1.0, [(second, -2.0), (third, -3.0)])], [0])
    logprobs = completion_logprobs(TOKENIZER, delta)
    assert logprobs is not None
    assert logprobs["top_logprobs"] == [{"bytes:\\x82": -2.0, "bytes:\\xac": -3.0, "bytes:\\xe2": -1.0}]
