"""What the client tells whoever counts: moments of requests, as plain data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from specserve.core.messages import FinishReason
from specserve.engine.client.sequence import Sequence


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One sequence's account; durations in seconds, None where it never got so far."""

    finish_reason: FinishReason
    prompt_tokens: int
    generation_tokens: int
    total: float
    queue: float | None  # arrival to first step
    prefill: float | None  # first step to first token
    decode: float | None  # first token to last


class Recorder(Protocol):
    """Receives every sequence's moments; durations in seconds."""

    def first_token(self, seconds: float) -> None:
        """Arrival to first token."""

    def inter_token(self, seconds: float) -> None:
        """Between two steps that brought tokens."""

    def finished(self, request: FinishedRequest) -> None:
        """However it ended."""


class NoRecorder:
    """Counts nothing."""

    def first_token(self, seconds: float) -> None:
        pass

    def inter_token(self, seconds: float) -> None:
        pass

    def finished(self, request: FinishedRequest) -> None:
        pass


def note_tokens(recorder: Recorder, sequence: Sequence, queued: float | None) -> None:
    """A step brought a sequence tokens now; `queued`: the seconds that the engine says it waited."""
    now, times = time.monotonic(), sequence.times
    if times.last_token is None:
        times.first_token, times.queued = now, queued
        recorder.first_token(now - times.arrival)
    else:
        recorder.inter_token(now - times.last_token)
    times.last_token = now


def account(sequence: Sequence, reason: FinishReason) -> FinishedRequest:
    """A sequence's account as it ends now."""
    times = sequence.times
    prefill = decode = None
    if times.first_token is not None and times.last_token is not None:
        prefill = times.first_token - times.arrival - (times.queued or 0.0)
        decode = times.last_token - times.first_token
    return FinishedRequest(
        finish_reason=reason,
        prompt_tokens=len(sequence.request.prompt_ids),
        generation_tokens=sequence.num_new_tokens,
        total=time.monotonic() - times.arrival,
        queue=times.queued,
        prefill=prefill,
        decode=decode,
    )
