"""EngineCore: requests in, tokens out. One step: schedule, submit, commit the oldest."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from msgspec.structs import replace

from specserve.config import EngineConfig, environment_threads
from specserve.core.checks import check_sum, check_tokens
from specserve.core.errors import ContextLengthError, InvalidRequestError
from specserve.core.messages import AddRequest, EngineStats, Ready, Reply, RequestOutput
from specserve.core.sampling_params import SamplingParams
from specserve.engine.core.adapter_calls import AdapterCall, AdapterCalls
from specserve.engine.core.build import Resolved, build_engine, dtype_name
from specserve.engine.core.costs import SECONDS, measure_costs
from specserve.engine.core.listening import Listening
from specserve.engine.core.step_clock import StepClock
from specserve.runtime.threads import fastest_thread_count
from specserve.runtime.ticket import Executor, Ticket
from specserve.runtime.trials import Trials
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.request import Request
from specserve.scheduling.scheduler import Scheduler
from specserve.speculation.proposer import Proposer

PROBE_TOKENS = 5  # a verification's
SWITCH_SECONDS = 0.0005  # how long a thread that reads an adapter may keep the interpreter from a step
IDLE_SECONDS = 0.001  # how long a step waits when all requests wait for an adapter's read or copy


class EngineCore:
    """One engine: models, scheduler, runner. Not thread-safe; two engines in one process are independent.

    Raises ModelLoadError or InvalidRequestError (a setting) at construction. `proposers`: more of them, by name;
    `progress`: show bars on stderr while it starts.
    """

    def __init__(self, config: EngineConfig, proposers: Sequence[Proposer] = (), *, progress: bool = False) -> None:
        built = build_engine(config, proposers, progress=progress)
        self.config = built.config
        self.built: Resolved = built
        self.adapters = built.adapters
        self.kv = KVCacheManager(
            built.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.kv,
            built.adapters,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=built.max_num_batched_tokens,
            draft_kv=built.proposers.keeps_kv(),
        )
        self.executor: Executor = built.runner
        self._tickets: deque[Ticket] = deque()
        self._clock = StepClock()
        self._done: list[RequestOutput] = []  # ended without a step
        self._calls = AdapterCalls(built.adapters)
        self._listening = Listening(built.proposers)
        draft = built.runner.draft
        self.ready = Ready(
            model=config.model,
            vocab_size=built.spec.vocab_size,
            max_model_len=built.max_model_len,
            eos_token_ids=list(built.spec.eos_token_ids),
            proposers=built.proposers.names,
            num_blocks=built.num_blocks,
            device=str(built.device),
            dtype=dtype_name(built.spec.dtype),
            quantization=built.spec.quantization,
            draft_quantization=None if draft is None else draft.model.spec.quantization,
        )

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Make one plan, submit it, and commit the oldest steps until fewer than `depth` are on their way."""
        for load in self.executor.loaded():
            self.adapters.loaded(load)
        plan = self.scheduler.schedule()
        if not plan.empty:
            self._tickets.append(self.executor.submit(plan))
        outputs = self._take_done()
        if plan.empty and not self._tickets:
            time.sleep(IDLE_SECONDS)
        may_stay = 0 if plan.empty else self._depth - 1  # several leave at once when a host proposer comes in
        while len(self._tickets) > may_stay:
            result = self._tickets.popleft().result()
            outputs += self.scheduler.commit(result, self._clock.ended())
        if plan.empty or not self.scheduler.has_work:
            self._clock.idle()
        self._listening.note(outputs)
        if self.config.check_integrity:
            self.check_integrity()
        return outputs

    @property
    def _depth(self) -> int:
        """A proposer on the host must see committed tokens, so nothing may be in flight when it drafts."""
        for request in self.scheduler.running:
            if request.proposer is not None and self.built.proposers.get(request.proposer).location == "host":
                return 1
        return self.built.pipeline_depth

    def _take_done(self) -> list[RequestOutput]:
        done, self._done = self._done + self.scheduler.take_failed(), []
        return done

    def has_work(self) -> bool:
        return bool(self.scheduler.has_work or self._done or self._calls.waiting or self.adapters.num_loading)

    # --- requests ---------------------------------------------------------------------------------------------------

    def add_request(self, request: AddRequest) -> None:
        """Queue a request, or raise the SpecserveError that says which field is wrong. Nothing is queued then."""
        if request.request_id in self.scheduler.requests:
            raise InvalidRequestError(f"request_id {request.request_id!r} is already running.", param="request_id")
        check_tokens(request.prompt_ids, request.output_ids, self.built.spec.vocab_size)
        check_sum(request.lora, self.config.max_adapters_per_request)
        self._check_room(request)
        prompt_len = len(request.prompt_ids)
        room = self.built.max_model_len - prompt_len
        params = self._resolve_params(request.params, room)
        proposer, drafts = self._resolve_speculation(params)
        added = Request(
            request_id=request.request_id,
            prompt_len=prompt_len,
            token_ids=[*request.prompt_ids, *request.output_ids],
            params=params,
            seed=request.seed,
            stop_ids=(() if params.ignore_eos else self.built.spec.eos_token_ids) + params.stop_token_ids,
            max_total=prompt_len + min(params.max_tokens or room, room),
            lora=request.lora,
            cache_salt=request.cache_salt,
            proposer=proposer,
            num_draft_tokens=drafts,
        )
        _check_resumable(added)
        if added.num_tokens >= added.max_total:  # resumed at its very end
            self._done.append(RequestOutput(request_id=request.request_id, finish_reason="length"))
            return
        if drafts is None:
            self.measure_costs()
        self.scheduler.add(added)
        self._listening.add(added)

    def measure_costs(self) -> None:
        """Find out what steps take, if that is not known and nothing runs; without it nothing is drafted unasked. A
        server does so when it starts, others when the first request comes that leaves the number of drafts to us."""
        built, policy = self.built, self.scheduler.policy
        if policy.models or self.scheduler.has_work:
            return
        measured = partial(
            measure_costs, max_rows=self.config.max_num_seqs, max_tokens=built.max_num_batched_tokens,
            proposers=built.proposers.names,
        )  # fmt: skip
        trials = partial(
            Trials, built.runner, max_model_len=built.max_model_len, depth=built.pipeline_depth,
            seconds=SECONDS.get(built.device.type, SECONDS["cuda"]),
        )  # fmt: skip
        table = measured(trials())
        with built.runner.pretended_adapters() as slots:
            dressed = measured(trials(slots=slots)) if slots else None
        if table is not None:
            policy.install(table, dressed)

    def _resolve_params(self, params: SamplingParams, room: int) -> SamplingParams:
        params.validate(self.built.spec.vocab_size)
        if params.bad_words:
            raise InvalidRequestError("The engine reads tokens alone: give bad_words_token_ids.", param="bad_words")
        params = replace(params, min_tokens=min(params.min_tokens, room))  # more says no more, and may overflow a row
        method = self.config.speculation_method
        if method == "auto" or params.speculation.method is not None:
            return params
        return replace(params, speculation=replace(params.speculation, method=method))

    def _resolve_speculation(self, params: SamplingParams) -> tuple[str | None, int | None]:
        asked = params.speculation
        proposer = asked.proposer or self.built.default_proposer
        drafts = self.config.num_draft_tokens if asked.num_draft_tokens is None else asked.num_draft_tokens
        if proposer is None:
            if asked.num_draft_tokens:
                raise InvalidRequestError(
                    f"speculation.num_draft_tokens is {drafts}, but no proposer is set: name one of "
                    f"{', '.join(self.built.proposers.names)} in speculation.proposer, or start with --draft-model.",
                    param="speculation",
                )
            return None, 0
        self.built.proposers.get(proposer)
        return (None, 0) if drafts == 0 else (proposer, drafts)

    def _check_room(self, request: AddRequest) -> None:
        prompt_len, limit = len(request.prompt_ids), self.built.max_model_len
        if prompt_len >= limit or prompt_len + len(request.output_ids) > limit:
            raise ContextLengthError(
                f"The prompt has {prompt_len} tokens and {len(request.output_ids)} are resumed; the context of {limit} "
                "must also hold the answer. Shorten the prompt.",
                param="prompt",
            )

    def abort_requests(self, ids: list[str]) -> None:
        """End requests now; their outputs stop. Unknown ids have just finished."""
        for request_id in ids:
            self.scheduler.abort(request_id)
            self._listening.end(request_id)

    # --- adapters ---------------------------------------------------------------------------------------------------

    def handle(self, call: AdapterCall) -> Reply | None:
        """Answer an adapter call now, or later through poll_replies (None) when it must read from disk."""
        return self._calls.handle(call)

    def poll_replies(self) -> list[Reply]:
        """Replies of loads that have finished since the last call."""
        self.adapters.poll()
        return self._calls.finished()

    # --- the rest ---------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Of adapters what changed since the last call."""
        counted, policy = self.scheduler.stats, self.scheduler.policy
        adapters, removed = self.adapters.changed()
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_blocks=self.kv.pool.num_blocks - 1,
            num_free_blocks=self.kv.pool.num_free,
            prefix_queries=self.kv.stats.queries,
            prefix_hits=self.kv.stats.hits,
            preemptions=counted.preemptions,
            steps=counted.steps,
            prompt_tokens=counted.prompt_tokens,
            generation_tokens=counted.generation_tokens,
            num_drafts=counted.rounds,
            num_draft_tokens=counted.drafted,
            num_accepted_tokens=counted.accepted,
            drafted_per_pos=list(counted.drafted_per_pos),
            accepted_per_pos=list(counted.accepted_per_pos),
            draft_length=policy.mean_drafts,
            step_cost_ratio=policy.ratio,
            probed_rows=policy.probing.probes,
            probe_seconds=policy.probing.spent / 1000.0,
            adapters=adapters,
            removed_adapters=removed,
            adapter_tiers=self.adapters.stats(),
        )

    def check_integrity(self) -> None:
        """Assert the invariants of scheduler, blocks and adapters; tests do so after every step."""
        self.scheduler.check_integrity()
        self.adapters.check_integrity()

    def close(self) -> None:
        """Stop the adapter reader; the engine must not be used after."""
        self.adapters.close()


def make_core(config: EngineConfig) -> EngineCore:
    """The engine of a process of its own, with as many CPU threads as serve its model best (or OMP_NUM_THREADS)."""
    core = EngineCore(config, progress=True)
    sys.setswitchinterval(SWITCH_SECONDS)
    if core.built.device.type == "cpu" and not environment_threads():
        runner = core.built.runner
        probe = partial(runner.trial_step, 1, PROBE_TOKENS)
        torch.set_num_threads(fastest_thread_count(probe, torch.get_num_threads()))
    if config.num_draft_tokens is None:
        core.measure_costs()
    return core


def _check_resumable(request: Request) -> None:
    """What is resumed cannot have gone on after a stop token."""
    first = request.prompt_len + request.params.min_tokens
    stop = next((token for token in request.token_ids[first:] if token in request.stop_ids), None)
    if stop is not None:
        raise InvalidRequestError(f"output_ids already holds the stop token {stop}.", param="output_ids")
