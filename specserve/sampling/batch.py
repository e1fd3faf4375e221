"""SamplingBatch: everything that processing and sampling one step's rows needs, as device tensors and host flags."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from specserve.sampling.counts import TokenCounts, token_counts


@dataclass(frozen=True, slots=True)
class SparseTokens:
    """Some tokens of some rows: row, token int64 [N]; value [N] float, added to their logits (−inf: forbidden)."""

    row: Tensor
    token: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class WordTokens:
    """Token sequences that rows must not complete, as `specserve_kernels.sampling.bad_words` wants them: row int64 [W];
    tokens [W, L] int64, right-aligned."""

    row: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Parameters of B rows in the order of the step. Host flags say which processors nobody uses: these cost nothing.

    Tensors are [B], in the logits' dtype unless noted. Greedy rows hold divisor 1, top_k = V, top_p = inf, min_p = 0.
    """

    vocab_size: int
    device_rows: Tensor  # int64, the rows' places in the persistent device state
    temperature: Tensor  # 0: greedy
    divisor: Tensor  # the temperature, 1 where greedy
    top_k: Tensor  # int64, V where off
    top_p: Tensor  # inf where off: rounding of the cumulated mass must not cut a token
    log_min_p: Tensor  # −inf where off
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    seed: Tensor  # int64, mixed
    prompt_len: Tensor  # int64
    min_tokens: Tensor  # int64
    is_coupled: Tensor  # bool, the method: true coupled, false rejection
    logit_bias: SparseTokens | None
    forbidden: SparseTokens | None  # while fewer than min_tokens are generated
    bad_words: WordTokens | None
    any_coupled: bool  # some row of temperature > 0 uses this method
    any_rejection: bool
    any_temperature: bool  # some divisor is not 1
    max_top_k: int  # the largest that is on, 0 if none is
    any_top_p: bool
    any_top_p_alone: bool  # in a row without top_k
    any_min_p: bool
    any_penalty: bool
    output_len: Tensor | None = None  # int64, tokens generated so far; set by with_history()
    counts: TokenCounts | None = None  # set if any_penalty
    length: Tensor | None = None  # int64, known tokens; set with `output_len`
    history: Tensor | None = None  # [R, L] int64, of all device rows and not copied; set if `bad_words` is

    @property
    def any_top_k(self) -> bool:
        return self.max_top_k > 0

    @property
    def any_sampled(self) -> bool:
        return self.any_coupled or self.any_rejection

    def with_history(self, lengths: Tensor, history: Tensor, max_length: int | None = None) -> SamplingBatch:
        """The batch as of this step; itself where no processor looks back.

        lengths [R] int64: each device row's known tokens, prompt and output; history [R, L] int64: these tokens, then
        anything; max_length: host bound of the batch's lengths, saves reading beyond it.
        """
        if self.forbidden is None and self.bad_words is None and not self.any_penalty:
            return self
        length = lengths[self.device_rows]
        counts = None
        if self.any_penalty:
            tokens = history[:, :max_length][self.device_rows]
            counts = token_counts(tokens, length, self.prompt_len, self.vocab_size, self.temperature.dtype)
        watched = None if self.bad_words is None else history
        return replace(self, output_len=length - self.prompt_len, counts=counts, length=length, history=watched)
