"""What a request may name as words that must not appear: as text, and as the token sequences that the engine reads."""

from __future__ import annotations

from collections.abc import Sequence

from specserve.core.errors import InvalidRequestError

MAX_WORDS = 128
MAX_SEQUENCES = 2 * MAX_WORDS  # each word with and without a space before it
MAX_TOKENS = 32  # of one sequence
SHOWN = 20  # characters of a word in a message


def check_words(words: Sequence[str]) -> None:
    """Raise InvalidRequestError unless `words` is a list of at most MAX_WORDS texts that are more than space."""
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise InvalidRequestError("bad_words must be a list of strings.", param="bad_words")
    if len(words) > MAX_WORDS:
        raise InvalidRequestError(f"bad_words may hold at most {MAX_WORDS} words, got {len(words)}.", param="bad_words")
    if not all(word.strip() for word in words):
        raise InvalidRequestError(
            "Each of bad_words must hold at least one character that is no space.", param="bad_words"
        )


def check_word_tokens(word: str, tokens: Sequence[int]) -> None:
    """Raise InvalidRequestError unless a word's tokens are some and at most MAX_TOKENS."""
    if not tokens:
        raise InvalidRequestError(f"The tokenizer has no token for {_shown(word)} of bad_words.", param="bad_words")
    if len(tokens) > MAX_TOKENS:
        raise InvalidRequestError(
            f"Each of bad_words may have at most {MAX_TOKENS} tokens; {_shown(word)} has {len(tokens)}.",
            param="bad_words",
        )


def check_sequences(
    sequences: Sequence[Sequence[int]], vocab_size: int | None, field: str = "bad_words_token_ids"
) -> None:
    """Raise InvalidRequestError naming `field` unless these can be forbidden: few and short enough, of tokens of the
    vocabulary, and not so many that no token might be left. vocab_size None: not known here."""
    if len(sequences) > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{field} may hold at most {MAX_SEQUENCES} token sequences, got {len(sequences)}.", param=field
        )
    for sequence in sequences:
        if not 1 <= len(sequence) <= MAX_TOKENS:
            raise InvalidRequestError(
                f"Each token sequence of {field} must have 1 to {MAX_TOKENS} tokens, got {len(sequence)}.", param=field
            )
    if vocab_size is None:
        return
    for token in (token for sequence in sequences for token in sequence):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{field} holds token {token}; the vocabulary has {vocab_size}.", param=field)
    if not some_token_stays(sequences, (), vocab_size):
        raise InvalidRequestError(f"{field} may forbid every token of the vocabulary at once.", param=field)


def some_token_stays(sequences: Sequence[Sequence[int]], stop_ids: Sequence[int], vocab_size: int) -> bool:
    """Whether, after whatever text, some token is neither a stop token nor completes one of the sequences.

    A text forbids most where it ends in the beginning of a sequence, and what stands before that adds nothing.
    """
    if len({*stop_ids, *(sequence[-1] for sequence in sequences)}) < vocab_size:
        return True
    parts = [(tuple(sequence[:-1]), sequence[-1]) for sequence in sequences]
    return all(
        len({*stop_ids, *(last for begun, last in parts if text[len(text) - len(begun) :] == begun)}) < vocab_size
        for text in {(), *(begun for begun, _ in parts)}
    )


def _shown(word: str) -> str:
    return repr(word if len(word) <= SHOWN else word[:SHOWN] + "…")
