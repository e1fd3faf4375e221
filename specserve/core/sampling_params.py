"""What a request asks of sampling and speculation. Names and defaults follow vLLM's where it has them."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from specserve.core.bad_words import check_sequences, check_words
from specserve.core.errors import InvalidRequestError

Method = Literal["rejection", "coupled"]
MAX_LOGPROBS = 20
MAX_N = 128


class SpeculationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A request's own word on speculation; None leaves the choice to the engine.

    `num_draft_tokens`: drafts a step, 0 turns drafting off. `method`: "rejection" (Leviathan et al. 2023) or
    "coupled" (Daliri, Musco, Suresh 2024). `proposer`: a registered proposer's name, or two of
    them, "ngram+draft_model".
    """

    num_draft_tokens: int | None = None
    method: Method | None = None
    proposer: str | None = None


NO_SPECULATION = SpeculationParams(num_draft_tokens=0)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to choose a request's tokens and when to stop. `validate()` names the field that is out of range."""

    n: int = 1
    max_tokens: int | None = None  # None: up to the context's end
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    bad_words: tuple[str, ...] = ()  # must not appear in what is generated
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # the same as tokens: all that the engine reads of it
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # None: none; 0: the chosen token's only; N: the top N too
    speculation: SpeculationParams = SpeculationParams()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def method(self) -> Method:
        """Requests that carry a seed are promised the target's own sample; the others take the likelier acceptance."""
        return self.speculation.method or ("coupled" if self.seed is not None else "rejection")

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise InvalidRequestError naming the first field that is out of range."""
        for field, ok, want in (
            ("n", 1 <= self.n <= MAX_N, f"between 1 and {MAX_N}"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k >= -1, "-1, 0 (off) or positive"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "between 0.01 and 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
            ("stop", all(self.stop), "non-empty strings"),
        ):
            if not ok:
                raise InvalidRequestError(f"{field} must be {want}, got {getattr(self, field)!r}.", param=field)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).", param="min_tokens"
            )
        drafts = self.speculation.num_draft_tokens
        if drafts is not None and not 0 <= drafts <= 64:
            raise InvalidRequestError(
                f"speculation.num_draft_tokens must be between 0 and 64, got {drafts}.", param="speculation"
            )
        check_words(self.bad_words)
        check_sequences(self.bad_words_token_ids, vocab_size)
        self._validate_tokens(vocab_size)

    def _validate_tokens(self, vocab_size: int | None) -> None:
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias) or not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(
                    f"logit_bias of token {token} must be between -100 and 100, got {bias}.", param="logit_bias"
                )
        if vocab_size is None:
            return
        for field, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise InvalidRequestError(
                        f"{field} holds token {token}; the vocabulary has {vocab_size}.", param=field
                    )
