"""AsyncEngine: prompts in, streams of text out; the engine itself runs, and is kept running, in its own process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor

import msgspec

from specserve.config import EngineConfig, resolve_paths
from specserve.core.checks import check_tokens
from specserve.core.errors import EngineDeadError, InvalidRequestError
from specserve.core.flows import flow_key
from specserve.core.messages import (
    AbortRequests,
    AdapterInfo,
    AddRequest,
    EngineStats,
    FinishReason,
    LoraRef,
    Ready,
    RequestOutput,
    StepOutputs,
)
from specserve.core.sampling_params import SamplingParams
from specserve.core.seeds import derive_seed
from specserve.engine.client.admission import Admission
from specserve.engine.client.bad_words import with_word_tokens
from specserve.engine.client.generation import Generation
from specserve.engine.client.launch import ENGINE_CORE
from specserve.engine.client.recorder import NoRecorder, Recorder, account, note_tokens
from specserve.engine.client.recovery import AdapterBook, AdapterCall, Supervisor
from specserve.engine.client.seeds import SeedSource
from specserve.engine.client.sequence import Delta, Sequence, begin_sequence
from specserve.engine.client.statistics import merge_stats
from specserve.engine.client.tokenizer import Tokenizer
from specserve.engine.client.validation import check_lora, resolve_params

INLINE_CHARACTERS = 4096  # shorter texts tokenise faster than a thread is woken

Prompt = str | list[int]


class AsyncEngine:
    """One engine as asyncio sees it. Use on one event loop.

    `tokenizer`, `ready` and `config` tell what it serves; `adapters` what is registered; `stats` the latest counters
    and every adapter's state.
    """

    def __init__(self, config: EngineConfig, *, core: str = ENGINE_CORE, recorder: Recorder | None = None) -> None:
        config = resolve_paths(config)
        self.config = config
        self.stats = EngineStats()
        self.tokenizer: Tokenizer
        self.ready: Ready
        self._recorder = recorder or NoRecorder()
        self._supervisor = Supervisor(config, core, self._on_outputs, self._on_death)
        self._live: dict[str, tuple[Sequence, Generation]] = {}
        self._admission = Admission(config.max_num_seqs + config.max_waiting)
        self._ids = itertools.count()
        self._seeds = SeedSource(config.seed)
        self._threads = ThreadPoolExecutor(1, "specserve-tokenize")

    async def start(self) -> None:
        """Start the engine process and load the tokenizer; raises ModelLoadError and the like."""
        tokenizer = asyncio.get_running_loop().run_in_executor(self._threads, Tokenizer.load, self.config.model)
        try:
            self.ready = await self._supervisor.start()
            self.tokenizer = await tokenizer
        except BaseException:
            # The engine's word on a broken model comes first; the tokenizer's own failure is then no news.
            await asyncio.gather(tokenizer, return_exceptions=True)
            await self.close()
            raise

    async def close(self) -> None:
        """End the engine process; what still runs ends with EngineDeadError."""
        await self._supervisor.close()
        self._fail_live("The server is shutting down.")
        self._threads.shutdown(wait=False)

    # --- state ---------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether requests are taken: false from an engine's death until the next one is ready."""
        return self._supervisor.alive

    async def wait_alive(self) -> None:
        await self._supervisor.wait_alive()

    @property
    def engine_pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def restarts(self) -> int:
        """How often the engine had to be started again."""
        return self._supervisor.restarts

    @property
    def adapters(self) -> AdapterBook:
        return self._supervisor.adapters

    @property
    def live(self) -> list[Sequence]:
        """Sequences that have not ended."""
        return [sequence for sequence, _ in self._live.values()]

    # --- generation ----------------------------------------------------------------------------------------------

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, off the event loop where it is long."""
        if len(text) < INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def _with_word_tokens(self, params: SamplingParams) -> SamplingParams:
        if not params.bad_words:
            return params
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, with_word_tokens, params, self.tokenizer, self.ready.vocab_size
        )

    async def submit(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams,
        *,
        lora: Seq[LoraRef] = (),
        output_ids: Seq[int] = (),
        cache_salt: str = "",
    ) -> Generation:
        """Queue every prompt × params.n; all are valid or none is queued.

        `output_ids` resumes one sequence: the tokens that an earlier run of the same prompt, params and seed gave. The
        deltas go on after them, and max_tokens counts them. Sampled text continues exactly where params.seed is set.

        Raises InvalidRequestError, ContextLengthError, NotFoundError, OverloadedError, EngineDeadError.
        """
        params.validate(self.ready.vocab_size)
        check_lora(lora, self.adapters, self.config.max_adapters_per_request)
        self._check_load(lora, len(prompts) * params.n)
        if output_ids and (len(prompts) != 1 or params.n != 1):
            raise InvalidRequestError("output_ids resumes one prompt with n = 1.", param="output_ids")
        params = await self._with_word_tokens(params)
        seed = self._seeds.next() if params.seed is None else params.seed
        sequences: list[Sequence] = []
        for number, prompt in enumerate(prompts):
            prompt_ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
            check_tokens(prompt_ids, output_ids, self.ready.vocab_size)
            resolved = resolve_params(params, len(prompt_ids), len(output_ids), self.ready)
            for sample in range(params.n):
                request = AddRequest(
                    request_id=str(next(self._ids)),
                    prompt_ids=prompt_ids,
                    params=resolved,
                    seed=derive_seed(seed, sample),
                    lora=tuple(lora),
                    output_ids=list(output_ids),
                    cache_salt=cache_salt,
                )
                sequences.append(begin_sequence(self.tokenizer, len(sequences), number, request))
        return self._launch(sequences)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        lora: Seq[LoraRef] = (),
        output_ids: Seq[int] = (),
        cache_salt: str = "",
    ) -> AsyncIterator[Delta]:
        """Stream one prompt's deltas; closing the iterator aborts. See `submit`."""
        generation = await self.submit([prompt], params, lora=lora, output_ids=output_ids, cache_salt=cache_salt)
        async with generation:
            async for delta in generation:
                yield delta

    async def resume(self, generation: Generation) -> Generation:
        """Go on with what an engine's death interrupted, once an engine is there: only the unfinished sequences.

        Greedy ones and those whose request carried a seed give exactly what they would have given; others go on with
        fresh randomness. Their indices stay.
        """
        await self.wait_alive()
        points = {point.index: point for point in generation.resume_points}
        return self._launch(
            [
                begin_sequence(
                    self.tokenizer,
                    old.index,
                    old.prompt,
                    msgspec.structs.replace(
                        old.request, request_id=str(next(self._ids)), output_ids=points[old.index].output_ids
                    ),
                )
                for old in generation.sequences
                if old.index in points
            ]
        )

    def _check_load(self, lora: Seq[LoraRef], num_new: int) -> None:
        if not self.alive:
            raise EngineDeadError("The engine is being restarted; try again shortly.")
        self._admission.check(flow_key(lora), num_new)

    def _launch(self, sequences: list[Sequence]) -> Generation:
        """All of one call, so on the same adapters."""
        generation = Generation(sequences, self._abort)
        lora = sequences[0].request.lora if sequences else ()
        self._check_load(lora, len(sequences))  # again: tokenising may have let others in, or the engine die
        for sequence in sequences:
            self._supervisor.send(sequence.request)
            self._live[sequence.request.request_id] = sequence, generation
            self._admission.enter(flow_key(lora))
        return generation

    def _abort(self, sequences: list[Sequence]) -> None:
        ids = [seq.request.request_id for seq in sequences if seq.request.request_id in self._live]
        for sequence in sequences:
            self._end(sequence, "abort")
        if ids and self.alive:
            self._supervisor.send(AbortRequests(ids))

    # --- adapters ------------------------------------------------------------------------------------------------

    async def call(self, call: AdapterCall) -> list[AdapterInfo]:
        """Load, unload, pin or list adapters; `call_id` is filled in. Raises AdapterError and the like."""
        return await self._supervisor.call(call)

    # --- what the engine says ------------------------------------------------------------------------------------

    def _on_outputs(self, steps: list[StepOutputs]) -> None:
        """Whoever waits for several of these steps is woken once, and finds them all."""
        touched: dict[Generation, None] = {}  # in the order of their outputs
        stopped: list[str] = []
        for step in steps:
            if step.stats is not None:
                self.stats = merge_stats(self.stats, step.stats)
            for output in step.outputs:
                entry = self._live.get(output.request_id)
                if entry is None:
                    continue  # aborted here; the engine had not heard yet
                self._deliver(*entry, output)
                touched[entry[1]] = None
                if output.finish_reason is None and entry[0].finish_reason is not None:
                    stopped.append(output.request_id)
        if stopped and self.alive:
            self._supervisor.send(AbortRequests(stopped))
        for generation in touched:
            generation.wake()

    def _deliver(self, sequence: Sequence, generation: Generation, output: RequestOutput) -> None:
        if output.error is not None:
            self._end(sequence, "error")
            generation.put(output.error.to_error())
            return
        delta = sequence.take(output)
        if delta.token_ids:
            note_tokens(self._recorder, sequence, output.queue_seconds)
        if delta.finish_reason is not None:
            self._end(sequence, delta.finish_reason)
        generation.put(delta)

    def _on_death(self) -> None:
        self.stats = EngineStats()  # nothing runs, and the next engine counts from 0
        self._fail_live("The engine died; it is being restarted. Resume through output_ids.")

    def _fail_live(self, message: str) -> None:
        for sequence, generation in list(self._live.values()):
            self._end(sequence, "error")
            generation.put(EngineDeadError(message))
            generation.wake()

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Forget a sequence, once, however it ended."""
        if self._live.pop(sequence.request.request_id, None) is None:
            return
        self._admission.leave(flow_key(sequence.request.lora))
        sequence.finish_reason = reason
        self._recorder.finished(account(sequence, reason))
