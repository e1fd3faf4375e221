"""A server's life: starting, refusing to start, clients that leave, signals, keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from serverkit.fixtures import scripted_args
from serverkit.processes import DEADLINE, Server, kit_environment, wait_until
from specserve.core.messages import Ready
from specserve.server.serve import other_weights

SLOW = {"SCRIPTED_STEP_SECONDS": "0.02"}


@contextmanager
def started(tiny: Path) -> Iterator[Server]:
    server = Server("serverkit.scripted_server", scripted_args(tiny), **SLOW)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def slow_server(tiny: Path) -> Iterator[Server]:
    """Shared: it outlives its engines."""
    with started(tiny) as server:
        yield server


@pytest.fixture
def mortal_server(tiny: Path) -> Iterator[Server]:
    """For a test that ends it."""
    with started(tiny) as server:
        yield server


def open_stream(server: Server, max_tokens: int, path: str = "/v1/completions", **fields: Any) -> socket.socket:
    """A streaming request on a socket of its own, its head and first event read."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=DEADLINE)
    body = json.dumps({"prompt": "abc", "temperature": 0, "max_tokens": max_tokens} | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def read_all(sock: socket.socket) -> str:
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    return data.decode()


def running(server: Server) -> float:
    return server.gauge("vllm:num_requests_running")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts(slow_server: Server, stream: bool) -> None:
    """500 tokens would take 5 s and more; the engine itself says that nothing runs long before."""
    before = slow_server.gauge("vllm:generation_tokens_total")
    sock = open_stream(slow_server, 500, stream=stream)
    wait_until(lambda: running(slow_server) == 1, "the request runs")
    sock.close()
    wait_until(lambda: running(slow_server) == 0, "the request is aborted")
    assert slow_server.gauge("vllm:generation_tokens_total") - before < 450
    _, text = slow_server.request("GET", "/metrics")
    assert 'finished_reason="abort"' in text
    assert "Traceback" not in slow_server.log


def test_sigterm_drains(mortal_server: Server) -> None:
    sock = open_stream(mortal_server, 300, stream=True)
    wait_until(lambda: running(mortal_server) == 1, "the request runs")
    mortal_server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: mortal_server.request("GET", "/ready")[0] == 503, "/ready says that it drains")
    status, answer = mortal_server.request("POST", "/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert mortal_server.request("GET", "/health")[0] == 200
    answer = read_all(sock)
    assert '"finish_reason":"length"' in answer
    assert "data: [DONE]" in answer
    assert mortal_server.process.wait(DEADLINE) == 0


def test_drain_is_bounded(tiny: Path) -> None:
    server = Server("serverkit.scripted_server", scripted_args(tiny, "--drain-timeout", "0.2"), **SLOW)
    sock = open_stream(server, 500, stream=True)
    wait_until(lambda: running(server) == 1, "the request runs")
    engine = server.engine_pid()
    assert server.stop() == 0
    assert '"error"' in read_all(sock)
    assert not Path(f"/proc/{engine}").exists()


def test_second_signal_ends_at_once(mortal_server: Server) -> None:
    sock = open_stream(mortal_server, 500, stream=True)
    wait_until(lambda: running(mortal_server) == 1, "the request runs")
    engine = mortal_server.engine_pid()
    mortal_server.process.send_signal(signal.SIGINT)
    wait_until(lambda: mortal_server.request("GET", "/ready")[0] == 503, "it drains")
    mortal_server.process.send_signal(signal.SIGINT)
    assert mortal_server.process.wait(DEADLINE) == 130
    wait_until(lambda: not Path(f"/proc/{engine}").exists(), "the engine ends too")
    assert "[DONE]" not in read_all(sock)


def test_killed_server_leaves_no_engine(mortal_server: Server) -> None:
    engine = mortal_server.engine_pid()
    mortal_server.process.kill()
    wait_until(lambda: not Path(f"/proc/{engine}").exists(), "the engine ends too")


def test_engine_death_is_an_error_event_and_resumable(slow_server: Server) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": "abcdefg", "max_tokens": 100, "seed": 9}
    with openai.OpenAI(base_url=slow_server.url + "/v1", api_key="none", max_retries=0) as client:
        text, killed = "", 0
        with pytest.raises(openai.APIError) as raised:
            for chunk in client.completions.create(**fields, stream=True):
                text += chunk.choices[0].text
                if not killed:
                    killed = slow_server.engine_pid()
                    os.kill(killed, signal.SIGKILL)
        body: Any = raised.value.body
        assert body["code"] == "engine_dead"
        (point,) = body["specserve"]["resume"]
        assert point["index"] == 0
        wait_until(lambda: slow_server.request("GET", "/ready")[0] == 200, "another engine is ready")
        rest = client.completions.create(**fields, extra_body={"output_ids": point["output_ids"]})
        whole = client.completions.create(**fields)
    assert text
    assert text + rest.choices[0].text == whole.choices[0].text
    assert rest.usage is not None
    assert rest.usage.completion_tokens == 100 - len(point["output_ids"])


def test_engine_death_fails_an_answer_that_does_not_stream(slow_server: Server) -> None:
    sock = open_stream(slow_server, 400, stream=False)
    wait_until(lambda: running(slow_server) == 1, "the request runs")
    os.kill(slow_server.engine_pid(), signal.SIGKILL)
    head, _, body = read_all(sock).partition("\r\n\r\n")
    assert " 503 " in head.split("\r\n")[0]
    error = json.loads(body)["error"]
    assert error["code"] == "engine_dead"
    assert set(error["specserve"]["resume"][0]) == {"index", "output_ids", "seed"}


def test_api_key(tiny: Path) -> None:
    server = Server("serverkit.scripted_server", scripted_args(tiny), SPECSERVE_API_KEY="sésame")
    try:
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert server.request("GET", path)[0] == 200
        for key in (None, "wrong"):
            for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/x")):
                status, answer = server.request(method, path, key=key)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert "sésame" not in server.log
    finally:
        server.stop()


def start_in_vain(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, capture_output=True, text=True, env=kit_environment(), timeout=DEADLINE, check=False)


def test_port_in_use_is_one_sentence(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = start_in_vain("specserve.cli.main", "serve", str(tiny / "model"), "--port", port)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--lora", "a=x", "--lora", "a=y"], "more than once"),
        (["--lora", "a b=x"], "adapter name 'a b'"),
        (["--adapter-root", "/nowhere/at/all"], "is no folder"),
        (["--host", "no.such.host.invalid"], "Cannot listen on no.such.host.invalid"),
    ],
)
def test_refused_settings_are_one_sentence(tiny: Path, args: list[str], said: str) -> None:
    done = start_in_vain("specserve.cli.main", "serve", str(tiny / "model"), *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("weights", "draft", "said"),
    [("none", None, ""), ("none", "int8", ", the draft's in int8"), ("fp8", "none", ", weights in fp8")],
)
def test_the_log_says_what_weights_are_kept_in(weights: str, draft: str | None, said: str) -> None:
    made = Ready(
        model="", vocab_size=1, max_model_len=1, eos_token_ids=[], proposers=[], num_blocks=1, device="cpu",
        dtype="float32", quantization=weights, draft_quantization=draft,
    )  # fmt: skip
    assert other_weights(made.facts()) == said
