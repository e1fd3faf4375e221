"""AsyncEngine's adapters: calls, failures, and what an engine that is started again is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from serverkit.fake_core import CRASH
from specserve.core.errors import AdapterError, EngineDeadError, InvalidRequestError, NotFoundError
from specserve.core.messages import AdapterInfo, ListAdapters, LoadAdapter, LoraRef, PinAdapter, UnloadAdapter
from specserve.core.sampling_params import SamplingParams
from specserve.engine.client.async_engine import AsyncEngine

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPT = [10, 20, 30]

StartEngine = Callable[..., Awaitable[AsyncEngine]]  # the fixture `start`


async def generate(engine: AsyncEngine, prompt: list[int], *names: str) -> list[int]:
    """The tokens of one greedy request with these adapters."""
    lora = [LoraRef(name) for name in names]
    return [token async for delta in engine.generate(prompt, GREEDY, lora=lora) for token in delta.token_ids]


async def die(engine: AsyncEngine) -> None:
    """Until the engine has died and another one serves."""
    with pytest.raises(EngineDeadError):
        await generate(engine, CRASH)
    async with asyncio.timeout(30):
        await engine.wait_alive()


async def view(engine: AsyncEngine, names: set[str]) -> dict[str, AdapterInfo]:
    """What the statistics say of adapters, once they tell of these and no others."""
    async with asyncio.timeout(30):
        while {info.name for info in engine.stats.adapters} != names:
            await asyncio.sleep(0.01)
    return {info.name: info for info in engine.stats.adapters}


async def test_adapter_that_fails_fails_its_requests_alone(start: StartEngine, tiny: Path) -> None:
    one = str(tiny / "adapters" / "one")
    engine = await start(loras=(("failing", one), ("one", one)))
    good = asyncio.create_task(generate(engine, PROMPT, "one"))
    with pytest.raises(AdapterError, match="NaN in lora_A"):
        await generate(engine, PROMPT, "failing")
    assert await good == PROMPT * 2


async def test_adapter_calls(start: StartEngine, tiny: Path) -> None:
    engine = await start()
    one = str(tiny / "adapters" / "one")
    (info,) = await engine.call(LoadAdapter(call_id=0, name="x", path=one))
    assert (info.name, info.path) == ("x", one)
    assert engine.adapters.names == ["x"]
    await engine.call(PinAdapter(call_id=0, name="x"))
    (info,) = await engine.call(ListAdapters(call_id=0))
    assert info.pinned
    with pytest.raises(AdapterError) as raised:
        await engine.call(LoadAdapter(call_id=0, name="y", path=one + "/missing"))
    assert raised.value.param == "path"
    await engine.call(UnloadAdapter(call_id=0, name="x"))
    with pytest.raises(NotFoundError):
        await engine.call(UnloadAdapter(call_id=0, name="x"))
    assert engine.adapters.names == []


async def test_adapter_that_is_gone_does_not_keep_the_engine_down(
    start: StartEngine, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "short-lived"
    folder.mkdir()
    engine = await start(loras=(("short", str(folder)), ("one", str(tiny / "adapters" / "one"))))
    folder.rmdir()
    await die(engine)
    assert engine.adapters.names == ["one"]


async def test_statistics_tell_of_every_adapter(start: StartEngine, tiny: Path) -> None:
    """The engine says what changed; the client knows the whole, and begins anew with a new engine."""
    one = str(tiny / "adapters" / "one")
    engine = await start(loras=tuple((f"a{number}", one) for number in range(20)))
    names = {f"a{number}" for number in range(20)}
    await generate(engine, PROMPT, "a3")
    infos = await view(engine, names)
    assert [info.requests for info in infos.values()] == [int(name == "a3") for name in infos]
    await generate(engine, PROMPT, "a5")
    await engine.call(UnloadAdapter(call_id=0, name="a7"))
    await engine.call(LoadAdapter(call_id=0, name="new", path=one))
    infos = await view(engine, names - {"a7"} | {"new"})
    assert sorted(name for name, info in infos.items() if info.requests) == ["a3", "a5"]
    await die(engine)
    await generate(engine, PROMPT, "new")
    infos = await view(engine, names - {"a7"} | {"new"})
    assert [name for name, info in infos.items() if info.requests] == ["new"]


async def test_restarted_engine_reads_pinned_adapters_alone(start: StartEngine, tiny: Path) -> None:
    """Of the others a look is enough: a thousand reads would keep everybody waiting. Weights stay."""
    one = str(tiny / "adapters" / "one")
    engine = await start(loras=(("registered", one),))
    await engine.call(LoadAdapter(call_id=0, name="loaded", path=one, weight=2.5))
    await engine.call(LoadAdapter(call_id=0, name="pinned", path=one, pinned=True))
    for _ in range(2):  # and the next one after it
        await die(engine)
        infos = {info.name: info for info in await engine.call(ListAdapters(call_id=0))}
        assert {name: info.tier for name, info in infos.items()} == {
            "registered": "disk",
            "loaded": "disk",
            "pinned": "host",
        }
        assert infos["loaded"].weight == 2.5
        assert infos["pinned"].pinned
        assert await generate(engine, PROMPT, "loaded") == PROMPT * 2


async def test_one_adapter_is_looked_at(start: StartEngine, tiny: Path) -> None:
    one = str(tiny / "adapters" / "one")
    engine = await start(loras=(("a", one), ("b", one)))
    assert [info.name for info in await engine.call(ListAdapters(call_id=0, name="b"))] == ["b"]
    assert await engine.call(ListAdapters(call_id=0, name="c")) == []


async def test_folders_of_adapters(start: StartEngine, tiny: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).symlink_to(tiny / "adapters" / "one")
    engine = await start(lora_dirs=(str(tmp_path),))
    assert engine.adapters.names == ["x", "y"]
    assert await generate(engine, PROMPT, "y") == PROMPT * 2
    with pytest.raises(InvalidRequestError, match="cannot be listed"):
        await start(lora_dirs=(str(tmp_path / "nothing"),))
