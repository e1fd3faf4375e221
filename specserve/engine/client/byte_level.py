"""Text of byte-level tokens (GPT-2's kind, Llama 3's, Qwen's): the tokens' bytes, one after another, read as UTF-8.

IncrementalDecoder (detokenizer.py) says the same for any tokenizer, by decoding everything twice; the tests hold the
two to each other and to the tokenizer's own decoding of the whole.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache


@cache
def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (Radford et al. 2019), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenPieces(dict[int, bytes]):
    """Token id → the bytes that it adds to a text; looked up when first asked for. Special and unknown ids add none."""

    def __init__(self, id_to_token: Callable[[int], str | None], special: Collection[int]) -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._special = special

    def __missing__(self, token_id: int) -> bytes:
        name = None if token_id in self._special else self._id_to_token(token_id)
        piece = b"" if name is None else _bytes_of(name)
        self[token_id] = piece
        return piece


def _bytes_of(name: str) -> bytes:
    """A vocabulary's name for a token as bytes; added tokens may be text as it is."""
    alphabet = byte_alphabet()
    return bytes(alphabet[char] for char in name) if all(char in alphabet for char in name) else name.encode()


class ByteLevelDecoder:
    """Tokens in, text out; the bytes of an unfinished character wait for the rest."""

    def __init__(self, pieces: Mapping[int, bytes], context: Sequence[int] = ()) -> None:
        """`context`: the tokens just before. Of a character that they begin, nothing is shown: its part there counts as
        U+FFFD, and that much is cut from what it turns out to be."""
        self._pieces = pieces
        self._held = b""
        self._cut = 0  # characters
        self.extend(context)
        self._cut = len(self._held.decode(errors="replace"))

    def push(self, token_id: int) -> str:
        return self.extend((token_id,))

    def extend(self, token_ids: Sequence[int]) -> str:
        """What these tokens finish, in one go."""
        data = self._held + b"".join([self._pieces[token] for token in token_ids])
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return self._shown(text)

    def flush(self) -> str:
        """What an unfinished character's bytes read as, at the end of the sequence."""
        held, self._held = self._held, b""
        return self._shown(held.decode(errors="replace"))

    def _shown(self, text: str) -> str:
        if self._cut and text:
            text = text[self._cut :]
            self._cut = 0
        return text
