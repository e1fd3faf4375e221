"""What a row's result means for its request: tokens appended, stops found, drafting counted."""

from __future__ import annotations

from specserve.core.messages import FinishReason, RequestOutput, SpeculationStats
from specserve.core.plan import RowResult
from specserve.scheduling.request import Request


def stop_reason(request: Request, token: int) -> FinishReason | None:
    """Why `token`, about to become the newest, ends the request; None if it goes on."""
    if token in request.stop_ids and request.num_output_tokens >= request.params.min_tokens:
        return "stop"
    if request.num_tokens + 1 >= request.max_total:
        return "length"
    return None


def accept_tokens(request: Request, result: RowResult) -> RequestOutput:
    """Append a step's tokens up to the first stop. A stop token itself is reported, not emitted."""
    output = RequestOutput(
        request_id=request.request_id, cached_tokens=request.cached_tokens, queue_seconds=request.queue_seconds
    )
    request.queue_seconds = None
    for token in result.token_ids:
        output.finish_reason = stop_reason(request, token)
        if output.finish_reason == "stop":
            output.stop_token_id = token
            break
        request.token_ids.append(token)
        output.token_ids.append(token)
        if output.finish_reason is not None:
            break
    if result.logprobs is not None:
        output.logprobs = result.logprobs[: len(output.token_ids)]
    return output


def record_speculation(stats: SpeculationStats, num_drafts: int, result: RowResult) -> None:
    """Count one verification round of `num_drafts` planned drafts into a request's own statistics."""
    stats.rounds += 1
    stats.drafted += result.num_drafted
    stats.accepted += result.num_accepted
    for counts, reached in (
        (stats.drafted_per_position, result.num_drafted),
        (stats.accepted_per_position, result.num_accepted),
    ):
        counts.extend([0] * (num_drafts - len(counts)))
        for index in range(reached):
            counts[index] += 1
