"""A real engine as a state machine: a small pool, two device slots, little host memory, adapters that come, go, change
and are broken, requests of every kind at depth 1 and 2. After every step its invariants hold; every request that ends
says what it says alone, in an engine without drafts or cache; at the end nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from lawbook.fakes import fakes
from lawbook.zoo import ADAPTERS, Zoo
from specserve.core.errors import AdapterBusyError, NotFoundError
from specserve.core.messages import AddRequest, LoadAdapter, LoraRef, PinAdapter, RequestOutput, UnloadAdapter
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.llm import LLM

ANSWER = 18
SEED = 5
CONTENTS = tuple(ADAPTERS)[:4]
HOST_BYTES = 190_000  # the largest adapter with its companion, and one or two of the others
NAMES = ("x", "y", "z", "bad")
BROKEN = "broken"
PROMPTS = ((7, 9, 11), tuple(range(20, 33)), (*range(20, 32), 40, 41, 42, 43), (5, 6, 7, 5, 6, 7, 5, 6, 7))
KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.0, "repetition_penalty": 1.4, "min_tokens": 5, "stop_token_ids": (11, 16, 27, 36, 40)},
    {"temperature": 0.8, "top_p": 0.9, "logit_bias": {8: 2.0}, "frequency_penalty": 0.5},
)

Alone = Callable[[int, int, tuple[tuple[str, float], ...]], tuple[list[int], str]]


@dataclass
class Asked:
    """A request under way: the tokens it must give, how it must end ("error": its adapter is broken)."""

    want: list[int]
    finish: str
    got: list[int] = field(default_factory=list)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self, zoo: Zoo, broken: Path, open_llm: Callable[..., LLM], alone: Alone) -> None:
        super().__init__()
        self.paths = {name: zoo.adapters["near"][name] for name in CONTENTS} | {BROKEN: broken}
        self.open_llm, self.alone = open_llm, alone
        self.contents = {str(path): name for name, path in self.paths.items()}
        self.asked: dict[str, Asked] = {}
        self.loads: dict[int, bool] = {}  # call id → whether it can work
        self.count = 0

    @initialize(depth=st.integers(1, 2), caching=st.booleans(), budget=st.sampled_from([4, 9, 60]))
    def start(self, depth: int, caching: bool, budget: int) -> None:
        self.llm = self.open_llm(
            max_model_len=48, num_blocks=17, max_loras=2, max_host_lora_bytes=HOST_BYTES, pipeline_depth=depth,
            max_num_batched_tokens=budget, enable_prefix_caching=caching, proposers=fakes(()),
            loras=tuple((name, str(self.paths[BROKEN if name == "bad" else CONTENTS[i]]))
                        for i, name in enumerate(NAMES)),
        )  # fmt: skip
        self.engine = self.llm.engine

    # --- requests ---------------------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1), kind=st.integers(0, len(KINDS) - 1), answer=st.integers(5, ANSWER),
        lora=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5])), max_size=2),
        drafts=st.sampled_from([0, 1, 4, 64]), resumed=st.integers(0, 6),
        proposer=st.sampled_from(
            ["draft_model", "ngram", "suffix", "ngram+draft_model", "suffix+draft_model", "random", "wrong"]
        ),
    )  # fmt: skip
    def add(
        self,
        prompt: int,
        kind: int,
        answer: int,
        lora: list[tuple[str, float]],
        drafts: int,
        resumed: int,
        proposer: str,
    ) -> None:
        known = {info.name: self.contents[info.path] for info in self.engine.adapters.list()}
        asked = self.expected(prompt, kind, answer, [(known.get(name, BROKEN), scale) for name, scale in lora])
        cut = min(resumed, max(0, len(asked.want) - 1))
        speculation = SpeculationParams(num_draft_tokens=drafts, method="coupled", proposer=proposer)
        request = AddRequest(
            request_id=str(self.count),
            prompt_ids=list(PROMPTS[prompt]),
            params=SamplingParams(seed=SEED, max_tokens=answer, speculation=speculation, **KINDS[kind]),
            seed=SEED,
            lora=tuple(LoraRef(name, scale) for name, scale in lora),
            output_ids=asked.want[:cut],
        )
        self.count += 1
        try:
            self.engine.add_request(request)
        except NotFoundError:
            assert any(name not in known for name, _ in lora)
        except AdapterBusyError:
            assert any(info.pinned for info in self.engine.adapters.list())
        else:
            del asked.want[:cut]
            self.asked[request.request_id] = asked

    def expected(self, prompt: int, kind: int, answer: int, lora: list[tuple[str, float]]) -> Asked:
        if any(content == BROKEN for content, _ in lora):
            return Asked([], "error")
        tokens, finish = self.alone(prompt, kind, tuple(lora))
        return Asked(tokens[:answer], "length" if len(tokens) >= answer else finish)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        del self.asked[name]
        self.engine.abort_requests([name])

    # --- adapters ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from([*CONTENTS, BROKEN]), pinned=st.booleans())
    def load(self, name: str, content: str, pinned: bool) -> None:
        self.count += 1
        path = str(self.paths[content])
        call = LoadAdapter(call_id=self.count, name=name, path=path, pinned=pinned, replace=True)
        reply = self.engine.handle(call)
        if reply is None:
            self.loads[self.count] = content != BROKEN
        else:
            assert reply.error is not None and reply.error.code == "adapter_busy"

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        reply = self.engine.handle(UnloadAdapter(call_id=0, name=name))
        assert reply is not None
        assert reply.error is None or reply.error.code in ("model_not_found", "adapter_busy")

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        reply = self.engine.handle(PinAdapter(call_id=0, name=name, pinned=pinned))
        assert reply is not None
        assert reply.error is None or reply.error.code in ("model_not_found", "adapter_busy")

    # --- time -------------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 8), reads=st.booleans())
    def steps(self, count: int, reads: bool) -> None:
        """Reads are taken in by `poll_replies` alone, after waiting for them: a run repeats itself."""
        for _ in range(count):
            self.step(reads)

    def step(self, reads: bool) -> None:
        if reads:
            self.engine.adapters.wait(10)
            for reply in self.engine.poll_replies():
                works = self.loads.pop(reply.call_id)
                assert works or reply.error is not None
        for output in self.engine.step():
            self.receive(output)

    def receive(self, output: RequestOutput) -> None:
        assert output.request_id in self.asked, "it had ended"
        asked = self.asked[output.request_id]
        asked.got += output.token_ids
        assert asked.got == asked.want[: len(asked.got)]
        if output.finish_reason is not None:
            assert output.finish_reason == asked.finish and asked.got == asked.want
            assert (output.error is not None) == (asked.finish == "error")
            del self.asked[output.request_id]

    def teardown(self) -> None:
        if not hasattr(self, "llm"):
            return
        for _ in range(3000):
            if not self.engine.has_work():
                break
            self.step(reads=True)
        assert not self.engine.has_work() and not self.asked and not self.loads, "it never ended"
        scheduler = self.engine.scheduler
        scheduler.kv.pool.check_integrity([])
        assert len(scheduler.free_rows) == self.llm.config.max_num_seqs
        assert all(info.running == 0 for info in self.engine.adapters.list())
        self.llm.close()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, zoo: Zoo) -> Path:
    """An adapter folder whose weights are no weights."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "adapter_config.json").write_bytes((zoo.adapters["near"]["a0"] / "adapter_config.json").read_bytes())
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    return folder


@pytest.fixture
def alone(open_llm: Callable[..., LLM]) -> Alone:
    """What a request says alone, with nothing else going on; computed once each."""
    llm = open_llm(draft_model=None, enable_prefix_caching=False, max_loras=2, pipeline_depth=1)
    known: dict[tuple[object, ...], tuple[list[int], str]] = {}

    def alone(prompt: int, kind: int, lora: tuple[tuple[str, float], ...]) -> tuple[list[int], str]:
        if (key := (prompt, kind, lora)) not in known:
            params = SamplingParams(seed=SEED, max_tokens=ANSWER, speculation=NO_SPECULATION, **KINDS[kind])
            refs = [LoraRef(*ref) for ref in lora]
            output = llm.generate([PROMPTS[prompt]], replace(params), lora=[refs or None])[0]
            known[key] = (output.token_ids, str(output.finish_reason))
        tokens, finish = known[key]
        return list(tokens), finish

    return alone


def test_engine_machine(zoo: Zoo, broken: Path, open_llm: Callable[..., LLM], alone: Alone) -> None:
    run_state_machine_as_test(
        lambda: EngineMachine(zoo, broken, open_llm, alone),
        settings=settings(
            max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
