"""From bad_words to the token sequences that the engine forbids: each word as the tokenizer writes it at the start of a
text, and behind a space."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from specserve.core.bad_words import check_sequences, check_word_tokens, check_words
from specserve.core.sampling_params import SamplingParams
from specserve.engine.client.tokenizer import Tokenizer

Sequences = tuple[tuple[int, ...], ...]


def with_word_tokens(params: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """The same parameters with the words' tokens beside the sequences that were given, and no words.

    Raises InvalidRequestError if a word is empty or too long, or if there are too many.
    """
    check_words(params.bad_words)
    sequences = (*params.bad_words_token_ids, *word_sequences(params.bad_words, tokenizer))
    check_sequences(sequences, vocab_size, "bad_words")
    return msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=sequences)


def word_sequences(words: Sequence[str], tokenizer: Tokenizer) -> Sequences:
    """Each word's tokens without and with a space before it, each sequence once. Spaces before a word as it was given
    say nothing."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        tokens = tuple(tokenizer.encode(bare, add_special_tokens=False))
        check_word_tokens(word, tokens)
        spaced = tuple(tokenizer.encode(" " + bare, add_special_tokens=False))
        check_word_tokens(word, spaced)
        found |= {tokens: None, spaced: None}
    return tuple(found)
