"""SamplingRows: the sampling parameters of every device row, kept on the host and gathered for a step's rows.

A steady decode asks for the same rows step after step: the batch is built once and kept until a row changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specserve.core.bad_words import some_token_stays
from specserve.core.sampling_params import Method, SamplingParams
from specserve.sampling.batch import SamplingBatch, SparseTokens, WordTokens
from specserve_kernels.sampling.bad_words import ANY
from specserve_kernels.sampling.random import mix64

GREEDY_BELOW = 1e-5  # vLLM's bound: dividing logits by less is argmax, with overflow
NUM_FLOATS = 7
NUM_INTS = 6
MAX_CACHED = 64


@dataclass(frozen=True, slots=True)
class _Row:
    """What the host must know of a row to set a batch's flags, and its few special tokens."""

    method: Method
    sampled: bool
    temperature: bool
    top_k: int  # 0: off
    top_p: bool
    min_p: bool
    penalty: bool
    logit_bias: dict[int, float]
    forbidden: tuple[int, ...]
    bad_words: NDArray[np.int64] | None  # [W, L], right-aligned


def _host_row(params: SamplingParams, stop_ids: Iterable[int], method: Method | None, vocab_size: int) -> _Row:
    sampled = params.temperature >= GREEDY_BELOW
    forbidden = tuple(sorted(set(stop_ids))) if params.min_tokens > 0 else ()
    return _Row(
        method=method or params.method,
        sampled=sampled,
        temperature=sampled and params.temperature != 1.0,
        top_k=params.top_k if sampled and 0 < params.top_k < vocab_size else 0,
        top_p=sampled and params.top_p < 1.0,
        min_p=sampled and params.min_p > 0.0,
        penalty=params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0,
        logit_bias=params.logit_bias,
        # were every other token a stop token, forbidding them would leave nothing to sample
        forbidden=forbidden if some_token_stays(params.bad_words_token_ids, forbidden, vocab_size) else (),
        bad_words=_aligned(params.bad_words_token_ids) if params.bad_words_token_ids else None,
    )


def _aligned(sequences: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Sequences that end in the last column, ANY before them."""
    words = np.full((len(sequences), max(map(len, sequences))), ANY, dtype=np.int64)
    for row, sequence in zip(words, sequences, strict=True):
        row[-len(sequence) :] = sequence
    return words


class SamplingRows:
    """Parameters of max_num_seqs rows. Not thread-safe; one owner, the model runner."""

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: of the logits that will be processed, float32 or float64."""
        assert dtype in (torch.float32, torch.float64), "half precision is processed in float32"
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._dtype = dtype
        # one buffer so that one copy moves it: float64 columns, then int64 columns stored by their bits
        self._packed = np.zeros((max_num_seqs, NUM_FLOATS + NUM_INTS), dtype=np.float64)
        self._ints = self._packed[:, NUM_FLOATS:].view(np.int64)
        self._host: list[_Row | None] = [None] * max_num_seqs
        self._cache: dict[tuple[int, ...], SamplingBatch] = {}

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        stop_ids: Iterable[int],
        prompt_len: int,
        method: Method | None = None,
    ) -> None:
        """A request takes `row`. stop_ids: what min_tokens forbids; prompt_len: how many tokens of its history are no
        output; method: overrides the request's own.
        """
        host = _host_row(params, stop_ids, method, self._vocab_size)
        self._host[row] = host
        self._packed[row, :NUM_FLOATS] = (
            params.temperature if host.sampled else 0.0,
            params.temperature if host.sampled else 1.0,
            params.top_p if host.top_p else math.inf,
            math.log(params.min_p) if host.min_p else -math.inf,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        top_k = host.top_k or self._vocab_size
        is_coupled = host.method == "coupled"
        self._ints[row] = (row, mix64(seed), top_k, prompt_len, params.min_tokens, is_coupled)
        self._cache.clear()

    def gather(self, rows: Sequence[int]) -> SamplingBatch:
        """The batch of these rows, in this order. Call `with_history` on it before processing logits."""
        key = tuple(rows)
        batch = self._cache.get(key)
        if batch is None:
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            batch = self._cache[key] = self._build(key)
        return batch

    def _build(self, rows: tuple[int, ...]) -> SamplingBatch:
        hosts = [host for row in rows if (host := self._host[row]) is not None]
        assert len(hosts) == len(rows), "set_row comes before gather"
        columns = np.ascontiguousarray(self._packed[list(rows)].T)  # kernels want each parameter dense
        packed = self._to_device(torch.from_numpy(columns))
        floats = packed[:NUM_FLOATS].to(self._dtype)
        temperature, divisor, top_p, log_min_p, repetition, presence, frequency = floats.unbind(0)
        device_rows, seed, top_k, prompt_len, min_tokens, coupled = packed.view(torch.int64)[NUM_FLOATS:].unbind(0)
        return SamplingBatch(
            vocab_size=self._vocab_size,
            device_rows=device_rows,
            temperature=temperature,
            divisor=divisor,
            top_k=top_k,
            top_p=top_p,
            log_min_p=log_min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            seed=seed,
            prompt_len=prompt_len,
            min_tokens=min_tokens,
            is_coupled=coupled != 0,
            logit_bias=self._sparse([host.logit_bias for host in hosts]),
            forbidden=self._sparse([dict.fromkeys(host.forbidden, -math.inf) for host in hosts]),
            bad_words=self._words([host.bad_words for host in hosts]),
            any_coupled=any(host.sampled and host.method == "coupled" for host in hosts),
            any_rejection=any(host.sampled and host.method == "rejection" for host in hosts),
            any_temperature=any(host.temperature for host in hosts),
            max_top_k=max((host.top_k for host in hosts), default=0),
            any_top_p=any(host.top_p for host in hosts),
            any_top_p_alone=any(host.top_p and not host.top_k for host in hosts),
            any_min_p=any(host.min_p for host in hosts),
            any_penalty=any(host.penalty for host in hosts),
        )

    def _sparse(self, tokens_of_rows: list[dict[int, float]]) -> SparseTokens | None:
        flat = [(row, *item) for row, tokens in enumerate(tokens_of_rows) for item in tokens.items()]
        if not flat:
            return None
        rows, tokens, values = zip(*flat, strict=True)
        index = self._to_device(torch.tensor([rows, tokens], dtype=torch.int64))
        return SparseTokens(index[0], index[1], self._to_device(torch.tensor(values, dtype=self._dtype)))

    def _words(self, words_of_rows: list[NDArray[np.int64] | None]) -> WordTokens | None:
        asked = [(row, words) for row, words in enumerate(words_of_rows) if words is not None]
        if not asked:
            return None
        width = max(words.shape[1] for _, words in asked)
        aligned = [np.pad(words, ((0, 0), (width - words.shape[1], 0)), constant_values=ANY) for _, words in asked]
        rows = np.concatenate([np.full(len(words), row, dtype=np.int64) for row, words in asked])
        packed = self._to_device(torch.from_numpy(np.concatenate((rows, np.concatenate(aligned).ravel()))))
        return WordTokens(packed[: len(rows)], packed[len(rows) :].view(len(rows), width))

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
