"""The client and the load it makes, against a server that makes its tokens up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from serverkit.fake_openai import Body, FakeOpenAI
from specserve.bench.answers import Answer, choices_asked
from specserve.bench.chunks import ChunkReader, error_text
from specserve.bench.client import connect
from specserve.bench.load import run_load
from specserve.bench.records import RequestRecord, RunRecord, TracedRequest
from specserve.bench.target import CHAT, Engine, Target, look
from specserve.core.errors import InvalidRequestError


def requests(count: int, *, rate: float = 0.0, tokens: int = 4, **more: Any) -> list[TracedRequest]:
    return [
        TracedRequest(index, index / rate if rate else 0.0, f"p{index}", 2, tokens, **more) for index in range(count)
    ]


def run(
    server: FakeOpenAI | str, trace: Sequence[TracedRequest], engine: Engine = "specserve", **more: Any
) -> RunRecord:
    """`more`: of the target as far as it has such fields, else of the load."""
    own = {name: more.pop(name) for name in list(more) if name in Target.__struct_fields__}
    url = server if isinstance(server, str) else server.url

    async def go() -> RunRecord:
        async with connect(Target(url=url, engine=engine, model="base", **own)) as client:
            return await run_load(client, trace, **more)

    return asyncio.run(go())


def test_a_record_tells_when_what_came() -> None:
    with FakeOpenAI(burst=2, gap=0.05) as server:
        record = run(server, requests(1, tokens=5), token_counts=True).requests[0]
    assert [event.tokens for event in record.events] == [2, 2, 1]
    times = [record.sent, *(event.time for event in record.events)]
    assert times == sorted(times) and times[-1] - times[0] >= 3 * 0.05
    assert record.end >= times[-1]
    assert (record.text, record.finish_reason, record.error) == (" w w w w w", "length", None)
    assert (record.prompt_tokens, record.output_tokens) == (5, 5)
    assert (record.drafted_per_position, record.accepted_per_position) == ([9, 8], [6, 2])


@pytest.mark.parametrize("engine", ["specserve", "vllm", "openai"])
@pytest.mark.parametrize("endpoint", ["/v1/completions", CHAT])
def test_tokens_are_counted_where_the_server_tells_and_events_where_not(engine: Engine, endpoint: str) -> None:
    with FakeOpenAI(owner=engine, burst=2) as server:
        told = run(server, requests(1), engine, token_counts=True, endpoint=endpoint).requests[0]
        silent = run(server, requests(1), engine, endpoint=endpoint).requests[0]
    role_alone = [0] if endpoint == CHAT else []
    assert [event.tokens for event in told.events] == [*role_alone, 2, 2]
    assert [event.tokens for event in silent.events] == [*role_alone, 1, 1]
    assert told.output_tokens == silent.output_tokens == 4


@pytest.mark.parametrize("engine", ["specserve", "vllm", "openai"])
@pytest.mark.parametrize("endpoint", ["/v1/completions", CHAT])
@pytest.mark.parametrize("together", [False, True])
def test_of_several_choices_all_tokens_count(engine: Engine, endpoint: str, together: bool) -> None:
    """Whether each has events of its own or all share theirs."""
    asked = requests(1, fields={"n": 3})
    with FakeOpenAI(owner=engine, burst=2, together=together) as server:
        told = run(server, asked, engine, token_counts=True, endpoint=endpoint).requests[0]
        silent = run(server, asked, engine, endpoint=endpoint).requests[0]
    roles = [0] * 3 if endpoint == CHAT else []
    assert [event.tokens for event in told.events] == [*roles, *([6, 6] if together else [2] * 6)]
    assert [event.tokens for event in silent.events] == [*roles, *([3, 3] if together else [1] * 6)]
    for record in (told, silent):
        assert (record.output_tokens, record.finish_reason, record.error) == (12, "length", None)
        assert record.text == " w w w w\n w1 w1 w1 w1\n w2 w2 w2 w2"


def test_an_answer_without_all_of_its_choices_is_an_error() -> None:
    """The server ends one of two, or knows nothing of `n`; and tells no total."""
    first = b'{"choices":[{"index":1,"text":"a b","finish_reason":"stop"}],"usage":{"completion_tokens":2}}'
    reader, answer, (request,) = ChunkReader(), Answer(asked=2), requests(1, fields={"n": 2})
    assert choices_asked(request) == 2
    for chunk in reader.feed(b"data: " + first + b"\n\n"):
        answer.add(chunk, 0.5)
    record = answer.record(request, 0.0, 1.0)
    assert (record.output_tokens, record.text) == (2, "a b")
    assert record.error == "The stream ended when 1 of 2 choices had."


def test_each_engine_is_asked_for_adapters_in_its_own_way() -> None:
    asked: dict[str, Body] = {}
    for engine in ("specserve", "vllm", "sglang", "tgi"):
        with FakeOpenAI(owner=engine) as server:
            run(server, requests(1, adapter="sql", fields={"temperature": 0.0}), engine)  # type: ignore[arg-type]
            asked[engine] = server.bodies[0]
    assert (asked["specserve"]["model"], asked["specserve"]["lora"]) == ("base", "sql")
    models = {engine: body["model"] for engine, body in asked.items() if "lora" not in body}
    assert models == {"vllm": "sql", "sglang": "base:sql", "tgi": "sql"}
    assert all(body["temperature"] == 0.0 and body["max_tokens"] == 4 for body in asked.values())
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in asked.values())


@pytest.mark.parametrize("owner", ["specserve", "vllm", "sglang", "tgi", "openai"])
def test_a_server_is_known_by_what_it_lists(owner: str) -> None:
    with FakeOpenAI(owner=owner, adapters=("a", "b"), root="/models/base") as server:
        found = asyncio.run(look(server.url, {}))
    assert (found.engine, found.model, found.root, found.adapters) == (owner, "base", "/models/base", ["a", "b"])


def test_no_server_is_one_sentence() -> None:
    with FakeOpenAI() as server:
        pass
    with pytest.raises(InvalidRequestError, match="No server answers"):
        asyncio.run(look(server.url, {}))


def test_requests_are_sent_at_their_arrivals() -> None:
    with FakeOpenAI(crowd=10) as server:  # who waited for an answer would never see one
        record = run(server, requests(10, rate=40.0, tokens=1))
    assert all(request.sent >= request.index / 40.0 for request in record.requests)
    assert {request.error for request in record.requests} == {None}
    assert server.most == 10
    ends = [request.end for request in record.requests]  # in whatever order
    assert record.duration == pytest.approx(max(ends) - record.requests[0].sent)


def test_no_more_run_at_once_than_allowed() -> None:
    with FakeOpenAI(gap=0.01, crowd=3) as server:
        record = run(server, requests(12, tokens=2), max_concurrency=3)
    assert server.most == 3
    assert record.complete and [request.index for request in record.requests] == list(range(12))


def test_single_failures_are_kept_and_the_rest_goes_on() -> None:
    def refuse(body: Body) -> tuple[int, str] | None:
        return (429, "The queue is full.") if body["prompt"] in ("p1", "p3") else None

    seen: list[RequestRecord] = []
    with FakeOpenAI(refuse=refuse) as server:
        record = run(server, requests(5), on_end=seen.append)
    assert record.complete
    errors = {request.index: request.error for request in record.requests}
    assert errors == {0: None, 1: "429: The queue is full.", 2: None, 3: "429: The queue is full.", 4: None}
    assert len(seen) == 5


def test_an_error_within_a_stream_keeps_what_had_come() -> None:
    with FakeOpenAI(break_after=2) as server:
        record = run(server, requests(1)).requests[0]
    assert (record.error, record.text, len(record.events)) == ("the engine died", " w w", 2)


@pytest.mark.parametrize("owner", ["specserve", "tgi"])
def test_a_stream_that_ends_too_soon_is_an_error(owner: str) -> None:
    with FakeOpenAI(owner=owner, break_after=2, break_silently=True) as server:
        record = run(server, requests(1)).requests[0]
    assert (record.error, record.text) == ("The stream ended before the answer did.", " w w")


def test_a_server_that_dies_ends_the_run_and_keeps_what_was_done() -> None:
    server, ended = FakeOpenAI(gap=0.01), 0

    def count(record: RequestRecord) -> None:
        nonlocal ended
        ended += 1
        if ended == 4:
            # In a thread: closing takes the server's loop, and ours must go on meanwhile.
            asyncio.get_running_loop().run_in_executor(None, server.die)

    record = run(server, requests(1000, rate=20.0), on_end=count)
    assert not record.complete and len(record.requests) < 1000
    good = [request for request in record.requests if request.error is None]
    bad = [request for request in record.requests if request.error is not None]
    assert len(good) >= 4 and bad
    assert all(request.text == " w" * 4 for request in good)
    server.die()


def test_a_stop_gives_up_what_runs_and_keeps_what_has_ended() -> None:
    async def go(url: str) -> RunRecord:
        stop = asyncio.Event()
        trace = requests(4)
        endless = [msgspec.structs.replace(request, max_tokens=1_000_000) for request in trace[2:]]

        def ended(record: RequestRecord) -> None:
            if record.index == 1:
                stop.set()

        async with connect(Target(url=url, engine="specserve", model="base")) as client:
            return await run_load(client, [*trace[:2], *endless], max_concurrency=4, on_end=ended, stop=stop)

    with FakeOpenAI(gap=0.001) as server:
        record = asyncio.run(go(server.url))
    assert not record.complete
    assert record.requests[-1].index == 1 and {request.error for request in record.requests} == {None}


def test_events_may_be_cut_anywhere() -> None:
    stream = (
        b': ping\n\ndata: {"choices":[{"text":"\xc3\xa9"}]}\r\n\r\nevent: x\ndata:{"usage":{"completion_tokens":3}}\n\n'
    )
    for cut in range(len(stream)):
        reader = ChunkReader()
        chunks = [*reader.feed(stream[:cut]), *reader.feed(stream[cut:]), *reader.feed(b"data: [DONE]\n")]
        assert [bool(chunk.choices) for chunk in chunks] == [True, False]
        assert chunks[0].choices is not None and chunks[0].choices[0].text == "é"
        assert chunks[1].usage is not None and chunks[1].usage.completion_tokens == 3
        assert reader.done


def test_errors_of_any_shape_become_a_sentence() -> None:
    assert error_text({"error": {"message": "no"}}) == error_text({"message": "no"}) == error_text("no") == "no"
    assert error_text({"detail": [1]}) == "[1]"
