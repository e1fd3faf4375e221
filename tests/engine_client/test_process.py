"""The engine's process as its parent sees it, and the frames between them."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverkit import SCRIPTED_CORE
from serverkit.processes import DEADLINE, kit_environment
from specserve.config import EngineConfig
from specserve.core.messages import AddRequest, FromEngine, Ready, RequestOutput, Shutdown, StepOutputs
from specserve.core.sampling_params import SamplingParams
from specserve.engine.core.framing import Channel, PeerGoneError, encode_frame


def start(config: EngineConfig) -> tuple[subprocess.Popen[bytes], Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "specserve.engine.core.process"),
                *("--fd", str(theirs.fileno()), "--core", SCRIPTED_CORE),
            ],
            pass_fds=(theirs.fileno(),),
            env=kit_environment(),
        )
    channel = Channel(ours)
    channel.send(config)
    assert isinstance(channel.receive_one(msgspec.msgpack.Decoder(FromEngine)), Ready)
    return process, channel, ours


def next_with_outputs(channel: Channel) -> StepOutputs:
    """The next message that is not statistics alone."""
    while True:
        message = channel.receive_one(msgspec.msgpack.Decoder(FromEngine))
        assert isinstance(message, StepOutputs)
        if message.outputs:
            return message


@pytest.fixture
def config(tiny: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny / "model"))


@pytest.mark.parametrize("running", [False, True], ids=["idle", "busy"])
def test_ends_when_its_parent_is_gone(config: EngineConfig, running: bool) -> None:
    process, channel, sock = start(config)
    if running:
        params = SamplingParams(max_tokens=10**9)
        channel.send(AddRequest(request_id="a", prompt_ids=[5], params=params, seed=1))
        next_with_outputs(channel)
    sock.close()
    assert process.wait(DEADLINE) == 0


def test_ends_on_shutdown(config: EngineConfig) -> None:
    process, channel, sock = start(config)
    with sock:
        channel.send(Shutdown())
        assert process.wait(DEADLINE) == 0


def test_statistics_before_anything_happens(tiny: Path) -> None:
    """So that /metrics tells of an idle server what it has."""
    one = str(tiny / "adapters" / "one")
    process, channel, sock = start(EngineConfig(model=str(tiny / "model"), loras=(("a", one), ("b", one))))
    with sock:
        message = channel.receive_one(msgspec.msgpack.Decoder(FromEngine))
        assert isinstance(message, StepOutputs)
        assert message.stats is not None
        assert [info.name for info in message.stats.adapters] == ["a", "b"]
        channel.send(Shutdown())
        assert process.wait(DEADLINE) == 0


def test_one_message_a_step_and_statistics_at_idle(config: EngineConfig) -> None:
    process, channel, sock = start(config)
    with sock:
        for name in "ab":
            params = SamplingParams(max_tokens=4, temperature=0.0)
            channel.send(AddRequest(request_id=name, prompt_ids=[5, 6], params=params, seed=1))
        outputs: dict[str, list[int]] = {"a": [], "b": []}
        stats = None
        while stats is None or stats.num_running or stats.generation_tokens < 8:
            message = channel.receive_one(msgspec.msgpack.Decoder(FromEngine))
            assert isinstance(message, StepOutputs)
            ids = [output.request_id for output in message.outputs]
            assert len(ids) == len(set(ids))
            for output in message.outputs:
                outputs[output.request_id] += output.token_ids
            stats = message.stats or stats
        assert outputs == {"a": [5, 6, 5, 6], "b": [5, 6, 5, 6]}
        channel.send(Shutdown())
        assert process.wait(DEADLINE) == 0


@given(sizes=st.lists(st.integers(0, 300), max_size=5), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_frames_survive_any_cutting(sizes: list[int], cuts: list[int]) -> None:
    messages = [RequestOutput(request_id=str(size), token_ids=list(range(size))) for size in sizes]
    data = b"".join(map(encode_frame, messages))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, received, turn = Channel(theirs), [], 0
        decoder = msgspec.msgpack.Decoder(RequestOutput)
        while data:
            ours.sendall(data[: cuts[turn % len(cuts)]])
            data = data[cuts[turn % len(cuts)] :]
            received += channel.receive(decoder, 0.0)
            turn += 1
    assert received == messages


def test_peer_gone_is_an_error_on_both_ways() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        channel = Channel(theirs)
        with pytest.raises(PeerGoneError):
            channel.send(Shutdown())
        with pytest.raises(PeerGoneError):
            channel.receive(msgspec.msgpack.Decoder(Shutdown), None)
