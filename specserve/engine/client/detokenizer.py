"""Token ids to text as they come: no broken character and no part of a stop string ever leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specserve.engine.client.byte_level import ByteLevelDecoder
from specserve.engine.client.tokenizer import Decoder

REPLACEMENT = "\ufffd"
# A character has at most four bytes, so at most four tokens: a longer run that still reads U+FFFD is no unfinished
# character but what the model wrote, and waiting for more of it would stall the stream.
MAX_UNFINISHED = 8
MAX_WINDOW = 64  # tokens decoded again with each new one, at most
CONTEXT = 6  # tokens of the prompt that the first decoded token is read after


class IncrementalDecoder:
    """One token in, its text out: empty while a character is unfinished.

    The text of a token depends on the tokens before it (spaces, multi-token characters), so a window of the last
    finished piece and the new one is decoded, and what the piece alone decodes to is cut off (as TGI and vLLM do).
    """

    def __init__(self, tokenizer: Decoder, *, context: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        """`context`: the tokens just before, so that a leading space that only shows after another word is kept."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._finished = list(context)  # the last piece whose text has left
        self._pending: list[int] = []  # tokens since
        self._finished_text = self._decode(self._finished)

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        return self._take(force=len(self._pending) > MAX_UNFINISHED)

    def extend(self, token_ids: Sequence[int]) -> str:
        """What these tokens finish."""
        return "".join([self.push(token) for token in token_ids])

    def flush(self) -> str:
        """What an unfinished character's bytes read as, at the end of the sequence."""
        return self._take(force=True) if self._pending else ""

    def _take(self, *, force: bool) -> str:
        text = self._decode(self._finished + self._pending)
        if text.endswith(REPLACEMENT) and not force:
            return ""
        new = text[len(self._finished_text) :]
        if new:
            self._finished = self._pending
        elif len(self._finished) < MAX_WINDOW:
            # No text of its own (special tokens, say): alone it would lose the context that spaces depend on.
            self._finished = self._finished + self._pending
        self._pending = []
        self._finished_text = self._decode(self._finished)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class StopStrings:
    """Finds the first place where a stop string is complete and holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._reach = max((len(stop) for stop in self._stops), default=0)

    def find(self, text: str, new_from: int) -> tuple[int, int] | None:
        """(start, end) of the match that ends first beyond `new_from`, of these the longest; None if there is none."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, new_from - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        if not matches:
            return None
        end, start = min(matches)
        return start, end

    def held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._reach - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(length < len(stop) and stop.startswith(tail) for stop in self._stops):
                return length
        return 0


@dataclass(slots=True)
class TextPiece:
    """What a push gave: `text` may be sent; `num_tokens` of the pushed tokens count (fewer once a stop is found).

    `offsets` are the tokens' starts in the whole text, in characters, where they were asked for; `stop` is the stop
    string that ended it.
    """

    text: str
    num_tokens: int
    offsets: Sequence[int] = ()
    stop: str | None = None


class Detokenizer:
    """One sequence's text. What was sent depends on its tokens alone, not on how they were cut into steps.

    `min_tokens`: a stop string that is complete before this many tokens is text like any other, as in vLLM.
    Without `offsets` and stop strings nobody needs to know where a token's text begins: a step is decoded in one go.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stops: Sequence[str] = (),
        *,
        context: Sequence[int] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        offsets: bool = True,
    ) -> None:
        self._decoder = _decoder(tokenizer, context[-CONTEXT:], skip_special_tokens)
        self._by_steps = not stops and not offsets
        self._stops = StopStrings(stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""
        self._num_sent = 0
        self._stop: str | None = None

    @property
    def num_characters(self) -> int:
        """Length of the text so far, what is held back included."""
        return self._num_sent if self._by_steps else len(self._text)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> TextPiece:
        """Take a step's tokens; with `last` nothing stays held back."""
        return self._push_step(token_ids, last) if self._by_steps else self._push_each(token_ids, last)

    def _push_step(self, token_ids: Sequence[int], last: bool) -> TextPiece:
        text = self._decoder.extend(token_ids)
        if last:
            text += self._decoder.flush()
        self._num_sent += len(text)
        return TextPiece(text, len(token_ids))

    def _push_each(self, token_ids: Sequence[int], last: bool) -> TextPiece:
        offsets = []
        for count, token_id in enumerate(token_ids, 1):
            offsets.append(len(self._text))
            self._num_tokens += 1
            if self._grow(self._decoder.push(token_id)):
                return TextPiece(self._send(0), count, offsets, self._stop)
        if last:
            self._grow(self._decoder.flush())
        held = 0 if last else self._stops.held(self._text)
        return TextPiece(self._send(held), len(token_ids), offsets, self._stop)

    def _grow(self, new: str) -> bool:
        """Append; true when a stop string is now complete: the text ends there."""
        old = len(self._text)
        self._text += new
        if not new or self._num_tokens <= self._min_tokens:
            return False
        match = self._stops.find(self._text, old)
        if match is None:
            return False
        start, end = match
        self._stop = self._text[start:end]
        self._text = self._text[: end if self._include_stop else start]
        return True

    def _send(self, held: int) -> str:
        end = max(self._num_sent, len(self._text) - held)
        text = self._text[self._num_sent : end]
        self._num_sent = end
        return text


def _decoder(
    tokenizer: Decoder, context: Sequence[int], skip_special_tokens: bool
) -> ByteLevelDecoder | IncrementalDecoder:
    """The fast one where tokens are bytes."""
    if tokenizer.pieces is not None and skip_special_tokens:
        return ByteLevelDecoder(tokenizer.pieces, context)
    return IncrementalDecoder(tokenizer, context=context, skip_special_tokens=skip_special_tokens)
