"""AsyncEngine over the scripted core in a process of its own: streams, seeds, aborts, deaths and what comes after."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
import pytest

from serverkit.fake_core import CRASH, scripted_token
from specserve.core.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
    NotFoundError,
    OverloadedError,
)
from specserve.core.messages import AddRequest, ListAdapters, LoadAdapter, LoraRef, PinAdapter, UnloadAdapter
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.core.seeds import derive_seed
from specserve.engine.client.async_engine import AsyncEngine
from specserve.engine.client.generation import Generation
from specserve.engine.client.recorder import FinishedRequest
from specserve.engine.client.sequence import Delta
from specserve.engine.client.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPT = [10, 20, 30]
FOREVER = SamplingParams(temperature=0.0, max_tokens=400)

StartEngine = Callable[..., Awaitable[AsyncEngine]]  # the fixture `start`


class Ledger:
    """A Recorder that keeps everything."""

    def __init__(self) -> None:
        self.ended: list[FinishedRequest] = []
        self.num_first = self.num_gaps = 0

    def first_token(self, seconds: float) -> None:
        self.num_first += 1

    def inter_token(self, seconds: float) -> None:
        self.num_gaps += 1

    def finished(self, request: FinishedRequest) -> None:
        self.ended.append(request)


async def collect(generation: Generation) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async with generation:
        async for delta in generation:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
    return tokens


def expected(prompt: list[int], params: SamplingParams, seed: int, count: int) -> list[int]:
    request = AddRequest(request_id="", prompt_ids=prompt, params=params, seed=seed)
    return [scripted_token(request, position) for position in range(count)]


async def until_idle(engine: AsyncEngine) -> None:
    """Until the engine process itself says that nothing runs."""
    async with asyncio.timeout(30):
        while engine.stats.num_running or not engine.stats.steps:
            await asyncio.sleep(0.01)


async def test_streams_every_token_once(start: StartEngine, tiny: Path) -> None:
    ledger = Ledger()
    engine = await start(ledger=ledger)
    deltas: list[Delta] = [delta async for delta in engine.generate(PROMPT, GREEDY)]
    assert [token for delta in deltas for token in delta.token_ids] == PROMPT * 2
    assert "".join(delta.text for delta in deltas) == engine.tokenizer.decode(PROMPT * 2)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert len(deltas) > 1
    (account,) = ledger.ended
    assert (account.finish_reason, account.prompt_tokens, account.generation_tokens) == ("length", 3, 6)
    assert (ledger.num_first, ledger.num_gaps) == (1, len(deltas) - 1)


async def test_samples_derive_their_seeds(start: StartEngine) -> None:
    engine = await start()
    params = SamplingParams(n=3, seed=11, max_tokens=5)
    tokens = await collect(await engine.submit([PROMPT, [40]], params))
    for prompt_number, prompt in enumerate((PROMPT, [40])):
        for sample in range(3):
            want = expected(prompt, params, derive_seed(11, sample), 5)
            assert tokens[3 * prompt_number + sample] == want
    assert tokens[0] != tokens[1]


async def test_requests_without_a_seed_get_their_own(start: StartEngine) -> None:
    engine = await start()
    params = SamplingParams(max_tokens=8)
    first, second = [await collect(await engine.submit([PROMPT], params)) for _ in range(2)]
    assert first != second


async def test_the_engines_seed_fixes_them(start: StartEngine) -> None:
    runs = []
    for _ in range(2):
        engine = await start(seed=5)
        runs.append([await collect(await engine.submit([PROMPT], SamplingParams(max_tokens=8))) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


async def test_stop_string_ends_the_request_in_the_engine(start: StartEngine) -> None:
    engine = await start()
    prompt = "ab|cd"
    params = msgspec.structs.replace(FOREVER, stop=("|c",))
    generation = await engine.submit([prompt], params)
    async with generation:
        text = "".join([delta.text async for delta in generation])
    assert text == "ab"
    assert generation.sequences[0].finish_reason == "stop"
    await until_idle(engine)
    assert engine.stats.generation_tokens < 400


async def test_leaving_early_aborts(start: StartEngine) -> None:
    ledger = Ledger()
    engine = await start(ledger=ledger)
    stream = engine.generate(PROMPT, FOREVER)
    await anext(stream)
    await stream.aclose()
    assert not engine.live
    await until_idle(engine)
    assert engine.stats.generation_tokens < 400
    assert [account.finish_reason for account in ledger.ended] == ["abort"]


async def test_default_max_tokens_is_what_fits(start: StartEngine) -> None:
    engine = await start(max_model_len=10)
    tokens = await collect(await engine.submit([PROMPT], SamplingParams(temperature=0.0)))
    assert len(tokens[0]) == 7


@pytest.mark.parametrize(
    ("prompts", "params", "lora", "error", "param"),
    [
        ([[]], GREEDY, [], InvalidRequestError, "prompt"),
        ([[300]], GREEDY, [], InvalidRequestError, "prompt"),
        ([[-1]], GREEDY, [], InvalidRequestError, "prompt"),
        ([[5] * 20], GREEDY, [], ContextLengthError, "prompt"),
        ([[5] * 16], GREEDY, [], ContextLengthError, "max_tokens"),
        ([[5] * 20], SamplingParams(), [], ContextLengthError, "prompt"),
        ([PROMPT, [5] * 20], GREEDY, [], ContextLengthError, "prompt"),
        ([PROMPT], SamplingParams(temperature=-1), [], InvalidRequestError, "temperature"),
        ([PROMPT], SamplingParams(n=10**12), [], InvalidRequestError, "n"),
        ([PROMPT], SamplingParams(logit_bias={300: 1.0}), [], InvalidRequestError, "logit_bias"),
        ([PROMPT], SamplingParams(speculation=SpeculationParams(proposer="x")), [], InvalidRequestError, "speculation"),
        ([PROMPT], GREEDY, [LoraRef("nope")], NotFoundError, "lora"),
        ([PROMPT], GREEDY, [LoraRef("one", float("inf"))], InvalidRequestError, "lora"),
        ([PROMPT], GREEDY, [LoraRef("one"), LoraRef("one", 2.0)], InvalidRequestError, "lora"),
        ([PROMPT], GREEDY, [LoraRef("one")] * 5, InvalidRequestError, "lora"),
        ([PROMPT] * 9, GREEDY, [], OverloadedError, None),
    ],
)
async def test_refused_before_anything_is_queued(
    start: StartEngine,
    tiny: Path,
    prompts: list[list[int]],
    params: SamplingParams,
    lora: list[LoraRef],
    error: type[Exception],
    param: str | None,
) -> None:
    loras = (("one", str(tiny / "adapters" / "one")),)
    engine = await start(max_model_len=20, max_num_seqs=4, max_waiting=4, loras=loras)
    with pytest.raises(error) as raised:
        await engine.submit(prompts, params, lora=lora)
    assert type(raised.value) is error
    assert raised.value.param == param
    assert not engine.live


async def test_a_full_house_refuses_the_flood_alone(start: StartEngine, tiny: Path) -> None:
    engine = await start(max_num_seqs=4, max_waiting=4, loras=(("one", str(tiny / "adapters" / "one")),))
    flood = await engine.submit([PROMPT] * 8, FOREVER)
    beside = await engine.submit([PROMPT] * 4, GREEDY, lora=[LoraRef("one")])
    for prompts, lora in (([PROMPT], []), ([PROMPT], [LoraRef("one")])):
        with pytest.raises(OverloadedError, match="whose share is 4"):
            await engine.submit(prompts, GREEDY, lora=lora)
    assert len(await collect(beside)) == 4
    async with flood:
        pass
    assert not engine.live
    assert len(await collect(await engine.submit([PROMPT] * 8, GREEDY))) == 8


async def test_an_integer_of_any_size_does_not_reach_the_wire(start: StartEngine) -> None:
    engine = await start()
    params = msgspec.structs.replace(GREEDY, top_k=10**30)
    assert (await collect(await engine.submit([PROMPT], params)))[0] == PROMPT * 2


async def test_killed_engine_is_replaced_and_streams_resume(start: StartEngine, tiny: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCRIPTED_STEP_SECONDS", "0.01")
    one = str(tiny / "adapters" / "one")
    engine = await start(loras=(("first", one), ("gone", one)))
    await engine.call(LoadAdapter(call_id=0, name="second", path=one))
    await engine.call(UnloadAdapter(call_id=0, name="gone"))
    await engine.call(PinAdapter(call_id=0, name="first"))
    params = SamplingParams(n=2, seed=3, max_tokens=60)
    want = {sample: expected(PROMPT, params, derive_seed(3, sample), 60) for sample in range(2)}

    generation = await engine.submit([PROMPT], params, lora=[LoraRef("second")])
    got: dict[int, list[int]] = {0: [], 1: []}
    killed = engine.engine_pid
    assert killed is not None
    with pytest.raises(EngineDeadError):
        async with generation:
            async for delta in generation:
                got[delta.index] += delta.token_ids
                if len(got[1]) > 10:
                    os.kill(killed, signal.SIGKILL)
    points = generation.resume_points
    assert [point.output_ids for point in points] == [got[0], got[1]]
    assert 10 < len(got[1]) < 60

    resumed = await engine.resume(generation)
    assert engine.restarts == 1
    assert {info.name: info.pinned for info in await engine.call(ListAdapters(call_id=0))} == {
        "first": True,
        "second": False,
    }
    rest = await collect(resumed)
    assert {index: got[index] + rest[index] for index in got} == want

    # The same by hand, one sample, as a client of the HTTP API does.
    by_hand = msgspec.structs.replace(params, n=1, seed=points[1].seed)
    again = await collect(await engine.submit([PROMPT], by_hand, output_ids=points[1].output_ids))
    assert got[1] + again[0] == want[1]


async def test_unexpected_error_ends_the_engine_not_the_server(start: StartEngine) -> None:
    engine = await start()
    with pytest.raises(EngineDeadError):
        await collect(await engine.submit([CRASH], GREEDY))
    with pytest.raises(EngineDeadError):
        await engine.submit([PROMPT], GREEDY)
    async with asyncio.timeout(30):
        await engine.wait_alive()
    assert (await collect(await engine.submit([PROMPT], GREEDY)))[0] == PROMPT * 2


async def test_resumed_text_follows_what_was_sent(start: StartEngine) -> None:
    """The stop string that the first half began is found by the second; a character cut in two arrives whole."""
    engine = await start()
    for text, stop in (("ab|cd", "|c"), ("x€y", "never")):
        prompt = await engine.encode(text)
        params = SamplingParams(temperature=0.0, max_tokens=len(prompt), stop=(stop,))
        whole = "".join([delta.text async for delta in engine.generate(prompt, params)])
        for cut in range(1, len(prompt)):
            first = SamplingParams(temperature=0.0, max_tokens=400, stop=(stop,))
            generation = await engine.submit([prompt], first)
            sent, tokens = "", []
            async with generation:
                async for delta in generation:
                    if len(tokens) + len(delta.token_ids) > cut or delta.finish_reason:
                        break
                    sent, tokens = sent + delta.text, tokens + delta.token_ids
            rest = "".join([delta.text async for delta in engine.generate(prompt, params, output_ids=tokens)])
            assert sent + rest == whole


async def test_closing_ends_what_runs_and_the_process(start: StartEngine) -> None:
    engine = await start()
    pid = engine.engine_pid
    assert pid is not None
    generation = await engine.submit([PROMPT], FOREVER)
    await anext(generation)
    await engine.close()
    with pytest.raises(EngineDeadError):
        await collect(generation)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_unreadable_model_is_the_engines_word(start: StartEngine, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"The model .* cannot be read\."):
        await start(model=str(tmp_path / "nothing"))


async def test_engine_that_dies_at_the_start(start: StartEngine) -> None:
    with pytest.raises(EngineDeadError, match="ended with status 1 while it started"):
        await start(core="serverkit.fake_core:nothing_of_this_name")


class FailingDecoder:
    """A tokenizer whose decoding breaks on one token."""

    pieces = None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        assert 99 not in token_ids, "scripted failure"
        return "x" * len(token_ids)


async def test_failure_of_ours_ends_streams_and_is_recovered(start: StartEngine) -> None:
    """Prompt [5, …, 99] decodes; the echoed 99 does not. No stream may hang on it."""
    engine = await start()
    sound, engine.tokenizer = engine.tokenizer, cast(Tokenizer, FailingDecoder())
    prompt = [99, *range(10, 20)]  # only the last few are decoded as context
    with pytest.raises(EngineDeadError):
        await collect(await engine.submit([prompt], GREEDY))
    engine.tokenizer = sound
    async with asyncio.timeout(30):
        await engine.wait_alive()
    assert (await collect(await engine.submit([PROMPT], GREEDY)))[0] == PROMPT * 2
