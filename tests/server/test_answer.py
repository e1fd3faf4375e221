"""Events put together from parts are, byte for byte, those that are made whole; slow and old clients get them too."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from serverkit.processes import DEADLINE, Server, wait_until
from serverkit.tiny import make_tokenizer
from specserve.core.messages import TokenLogprobs
from specserve.engine.client.generation import Generation
from specserve.engine.client.sequence import Delta
from specserve.engine.client.tokenizer import Tokenizer
from specserve.server import chat, completions
from specserve.server.answer import Answer, Dialect, event_bytes
from specserve.server.streaming import direct_writer

TOKENIZER = Tokenizer(make_tokenizer())
DIALECTS = [chat._dialect(TOKENIZER), completions._dialect(TOKENIZER)]
LOGPROBS = [TokenLogprobs(9, -0.5)]

deltas = st.builds(
    Delta,
    index=st.integers(0, 2),
    text=st.text(max_size=12) | st.sampled_from(['"}', "\\", "\u2028", "\x00\x1f", "</script>", '[]"token_ids":[]']),
    token_ids=st.lists(st.integers(0, 2**18), max_size=3),
    logprobs=st.none(),
    offsets=st.just([]),
)


def twins(dialect: Dialect, **told: Any) -> tuple[Answer, Answer]:
    fields = {"model": '"m[]"', "include_usage": False, "return_token_ids": False, "id": "1", "created": 2} | told
    return Answer(dialect, **fields), Answer(dialect, **fields)


@given(
    dialect=st.sampled_from(DIALECTS),
    include_usage=st.booleans(),
    return_token_ids=st.booleans(),
    items=st.lists(deltas, min_size=1, max_size=8),
)
def test_parts_make_the_same_bytes(
    dialect: Dialect, include_usage: bool, return_token_ids: bool, items: list[Delta]
) -> None:
    plain, quick = twins(dialect, include_usage=include_usage, return_token_ids=return_token_ids)
    begun: set[int] = set()
    for item in items:
        want = event_bytes(plain.chunk(item))
        got = quick.quick_events([item])
        assert (got is not None) == (item.index in begun)
        if got is None:
            assert quick.event(item) == want
            begun.add(item.index)
        else:
            assert got == (want if item.text or item.token_ids else b"")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_waiting_deltas_merge_into_one_event_a_choice(dialect: Dialect) -> None:
    plain, quick = twins(dialect, return_token_ids=True)
    for index in (0, 1):
        first = Delta(index, "x", [1], None, [])
        assert quick.event(first) == event_bytes(plain.chunk(first))
    waiting = [
        Delta(1, "a", [2, 3], None, []),
        Delta(0, "", [4], None, []),
        Delta(1, "b", [5], None, []),
        Delta(0, "é", [6], None, []),
    ]
    whole = [Delta(1, "ab", [2, 3, 5], None, []), Delta(0, "é", [4, 6], None, [])]
    assert quick.quick_events(waiting) == b"".join(event_bytes(plain.chunk(delta)) for delta in whole)


@pytest.mark.parametrize(
    "special",
    [
        Delta(0, "a", [2], None, [], "stop"),
        Delta(0, "a", [9], LOGPROBS, [0]),
        Delta(1, "a", [2], None, []),  # its first
        ValueError("an error is no delta"),
    ],
)
def test_whatever_is_more_than_text_is_left_to_the_plain_way(special: Any) -> None:
    _, quick = twins(DIALECTS[1])
    quick.event(Delta(0, "x", [1], None, []))
    text = Delta(0, "y", [2], None, [])
    assert quick.quick_events([text]) is not None
    assert quick.quick_events([text, special]) is None


# --- clients ---------------------------------------------------------------------------------------------------------


def ask(server: Server, body: dict[str, Any], version: str, receive_buffer: int = 0) -> socket.socket:
    """A connection that has asked and not read."""
    url = urlsplit(server.url)
    sock = socket.socket()
    sock.settimeout(DEADLINE)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((url.hostname, url.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def read_all(sock: socket.socket) -> tuple[str, bytes]:
    """(head, body) of an answer after which the server closes."""
    with sock:
        data = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    return head.decode(), body


def unchunked(body: bytes) -> bytes:
    parts = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert body == b"\r\n"
            return b"".join(parts)
        parts.append(body[:length])
        assert body[length : length + 2] == b"\r\n"
        body = body[length + 2 :]


def events(body: bytes) -> list[dict[str, Any]]:
    *lines, last, rest = body.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


PROMPT = "hé 🙂 "


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    said: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    return said


def echo(num_tokens: int) -> str:
    ids = TOKENIZER.encode(PROMPT)
    return TOKENIZER.decode((ids * num_tokens)[:num_tokens])


def test_a_client_that_does_not_read_gets_everything_when_it_does(scripted_server: Server) -> None:
    """Far more is said than socket and transport hold; what waits is merged, and nothing of it is lost or doubled."""
    count, samples = 400, 64
    body = {"prompt": PROMPT, "max_tokens": count, "n": samples, "temperature": 0, "stream": True}
    said = "vllm:generation_tokens_total"
    before = scripted_server.gauge(said)
    sock = ask(scripted_server, body, "1.1", receive_buffer=4096)
    wait_until(lambda: scripted_server.gauge(said) - before == samples * count, "the engine says it all")
    head, raw = read_all(sock)
    assert "chunked" in head.lower()
    chunks = events(unchunked(raw))
    assert texts(chunks) == dict.fromkeys(range(samples), echo(count))
    assert len(chunks) < samples * count / 2  # a step gives 1 to 3 tokens: merged, on the whole
    finals = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert finals.count("length") == samples


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_old_clients_get_events_without_chunks(scripted_server: Server, version: str) -> None:
    options = {"include_usage": True}
    body = {"prompt": PROMPT, "max_tokens": 50, "temperature": 0, "stream": True, "stream_options": options}
    head, raw = read_all(ask(scripted_server, body, version))
    assert ("transfer-encoding: chunked" in head.lower()) == (version == "1.1")
    *chunks, usage = events(unchunked(raw) if version == "1.1" else raw)
    assert texts(chunks) == {0: echo(50)}
    assert usage["usage"]["completion_tokens"] == 50


def test_a_connection_is_used_again_after_a_stream(scripted_server: Server) -> None:
    url = urlsplit(scripted_server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=DEADLINE)
    first = None
    for count in (200, 30):
        body = {"prompt": PROMPT, "max_tokens": count, "temperature": 0, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        first = first or connection.sock
        assert texts(events(connection.getresponse().read())) == {0: echo(count)}
        assert connection.sock is first
    connection.close()


@pytest.mark.parametrize(("chunked", "compressed"), [(True, False), (True, True), (False, False)])
def test_what_goes_past_aiohttp_is_chunks_that_it_would_write_at_once(chunked: bool, compressed: bool) -> None:
    response = web.StreamResponse()
    if chunked:
        response.enable_chunked_encoding()
    if compressed:
        response.enable_compression()
    generation = Generation([], lambda sequences: None)
    write = direct_writer(
        make_mocked_request("POST", "/", transport=MagicMock()), response, generation, twins(DIALECTS[0])[0]
    )
    assert (write is not None) == (chunked and not compressed)
