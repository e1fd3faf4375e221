"""An engine core without a model: each step gives every request so many words, so many milliseconds after the last.

Environment: STREAMING_TOKENS words a step and request, STREAMING_STEP_MS milliseconds a step; 0: as fast as whoever
reads the steps takes them. What it gives is all words with a space before and none inside, so that a reader of the
stream counts tokens by counting spaces.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from transformers import AutoTokenizer

from specserve.config import EngineConfig
from specserve.core.messages import (
    AddRequest,
    EngineStats,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Ready,
    Reply,
    RequestOutput,
    SpeculationStats,
    UnloadAdapter,
)

NUM_WORDS = 1 << 14  # of the cycle that requests read from, each from a place of its own
MIN_WORDS = 100
MAX_MODEL_LEN = 1 << 20


class PacedCore:
    """See the module."""

    def __init__(self, config: EngineConfig) -> None:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        self.ready = Ready(
            model=config.model, vocab_size=len(tokenizer), max_model_len=MAX_MODEL_LEN, eos_token_ids=[],
            proposers=[], num_blocks=1, device="none", dtype="none",
        )  # fmt: skip
        self._tokens = int(os.environ["STREAMING_TOKENS"])
        self._step_seconds = float(os.environ["STREAMING_STEP_MS"]) / 1000.0
        words = word_ids(tokenizer.decode, len(tokenizer))
        self._words = random.Random(0).choices(words, k=NUM_WORDS + self._tokens)
        self._done: dict[str, int] = {}  # request → tokens given
        self._left: dict[str, int] = {}  # request → tokens to give
        self._next_step = 0.0
        self._counted = EngineStats(num_blocks=1)

    def add_request(self, request: AddRequest) -> None:
        assert request.params.max_tokens is not None
        self._done[request.request_id] = random.Random(request.seed).randrange(NUM_WORDS)
        self._left[request.request_id] = request.params.max_tokens

    def abort_requests(self, ids: list[str]) -> None:
        for request_id in ids:
            self._done.pop(request_id, None)
            self._left.pop(request_id, None)

    def handle(self, call: LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters) -> Reply:
        return Reply(call_id=call.call_id)

    def poll_replies(self) -> list[Reply]:
        return []

    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[RequestOutput]:
        self._wait()
        self._counted.steps += 1
        outputs = [self._advance(request_id) for request_id in self._left]
        for output in outputs:
            self._counted.generation_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                self.abort_requests([output.request_id])
        return outputs

    def stats(self) -> EngineStats:
        self._counted.num_running = len(self._left)
        return self._counted

    def close(self) -> None:
        pass

    def _wait(self) -> None:
        """Until the step is due. What came too late is not made up for: a GPU would not hurry either."""
        now = time.monotonic()
        time.sleep(max(0.0, self._next_step - now))
        self._next_step = max(now, self._next_step) + self._step_seconds

    def _advance(self, request_id: str) -> RequestOutput:
        count = min(self._tokens, self._left[request_id])
        start = self._done[request_id] % NUM_WORDS
        self._done[request_id] += count
        self._left[request_id] -= count
        over = not self._left[request_id]
        return RequestOutput(
            request_id=request_id,
            token_ids=self._words[start : start + count],
            finish_reason="length" if over else None,
            speculation=SpeculationStats() if over else None,
        )


def word_ids(decode: Callable[[list[int]], str], vocab_size: int) -> list[int]:
    """Tokens that read as one space and ASCII letters after another word; raises ValueError if there are few."""
    first = next(token for token in range(vocab_size) if decode([token]).isalpha())
    word = decode([first])
    ids = []
    for token in range(vocab_size):
        text = decode([first, token])[len(word) :]
        if text[:1] == " " and text[1:].isascii() and text[1:].isalpha():
            ids.append(token)
    if len(ids) < MIN_WORDS:
        raise ValueError(f"The tokenizer has {len(ids)} tokens that are a space and letters; take another model.")
    return ids
