"""specserve: EngineCore in this process, stepped as the server's engine process steps it, without a socket."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from benchmarks.engines import Setup
from specserve.config import EngineConfig
from specserve.core.messages import AddRequest, LoraRef, RequestOutput, SpeculationStats, TokenLogprobs
from specserve.core.sampling_params import SamplingParams
from specserve.engine.core.core import make_core

Between = Callable[[], None]


@dataclass(slots=True)
class Sequel:
    """What one request got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # perf_counter of each token
    speculation: SpeculationStats | None = None  # of all its rounds, when it has ended


class SpecserveEngine:
    """An EngineCore with the settings of the benchmark; everything else is as the engine decides."""

    def __init__(self, setup: Setup) -> None:
        options = {
            "model": str(setup.pair / "target"),
            "draft_model": str(setup.pair / "draft") if setup.mode.speculates else None,
            "num_draft_tokens": setup.mode.drafts,
            "loras": tuple((name, str(path)) for name, path in setup.loras.items()),
            "max_loras": max(setup.mode.loras, 8),
            "device": setup.device,
            "max_num_seqs": setup.max_num_seqs,
            "max_num_batched_tokens": 8192,
            "max_model_len": setup.max_model_len,
            "enable_prefix_caching": False,
        }
        self.core = make_core(EngineConfig(**(options | dict(setup.options))))
        gc.freeze()  # as the server's engine process does: else a collection takes some 200 ms of a step
        self._ids = count()
        self._drafting = SpeculationStats()
        self._firsts = [0, 0]  # drafts at position 1, and how many were accepted

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], out: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)
        return [sequel.token_ids for sequel in self.run(self.requests(prompts, adapters, params))]

    def requests(
        self, prompts: Sequence[list[int]], adapters: Sequence[str | None], params: SamplingParams
    ) -> list[AddRequest]:
        return [
            AddRequest(
                request_id=f"bench-{next(self._ids)}", prompt_ids=prompt, params=params, seed=index,
                lora=() if adapter is None else (LoraRef(adapter),),
            )
            for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]  # fmt: skip

    def run(self, requests: Sequence[AddRequest], between: Between | None = None) -> list[Sequel]:
        """Run the requests to their end. `between` is called after every step."""
        sequels = {request.request_id: Sequel() for request in requests}
        for request in requests:
            self.core.add_request(request)
        while self.core.has_work():
            outputs = self.core.step()
            self.core.poll_replies()
            if outputs:
                self._take(outputs, sequels)
            if between is not None:
                between()
        return list(sequels.values())

    def _take(self, outputs: list[RequestOutput], sequels: dict[str, Sequel]) -> None:
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise output.error.to_error()
            sequel = sequels[output.request_id]
            sequel.arrivals += [now] * len(output.token_ids)
            sequel.token_ids += output.token_ids
            sequel.logprobs += output.logprobs or []
            if output.speculation is not None:
                sequel.speculation = output.speculation
                self._drafting.rounds += output.speculation.rounds
                self._drafting.drafted += output.speculation.drafted
                self._drafting.accepted += output.speculation.accepted
                self._firsts[0] += sum(output.speculation.drafted_per_position[:1])
                self._firsts[1] += sum(output.speculation.accepted_per_position[:1])

    def facts(self) -> dict[str, object]:
        drafting, self._drafting = self._drafting, SpeculationStats()
        firsts, self._firsts = self._firsts, [0, 0]
        ready = self.core.ready
        made = ready.facts()
        facts: dict[str, object] = {"num_blocks": ready.num_blocks, "dtype": made["weights"]}
        if "draft_weights" in made:
            facts["draft_dtype"] = made["draft_weights"]
        if drafting.rounds:
            facts["drafts_per_round"] = round(drafting.drafted / drafting.rounds, 3)
            facts["accepted_share"] = round(drafting.accepted / max(1, drafting.drafted), 4)
            facts["accepted_first"] = round(firsts[1] / max(1, firsts[0]), 4)
            facts["tokens_per_round"] = round(1 + drafting.accepted / drafting.rounds, 3)
        # What graphs cost, where the runner captures any.
        graphs = self.core.built.runner.graph_facts
        return facts | ({"graphs": graphs} if graphs else {})

    def close(self) -> None:
        gc.unfreeze()  # what the engine held can be collected again
        self.core.close()
        if self.core.built.device.type == "cuda":
            torch.cuda.synchronize()


def open_engine(setup: Setup) -> SpecserveEngine:
    return SpecserveEngine(setup)
