"""The kit's fixtures, and engines over the scripted core in processes of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from serverkit import SCRIPTED_CORE
from serverkit.fixtures import kit_on_path, scripted_server, tiny
from specserve.config import EngineConfig
from specserve.engine.client.async_engine import AsyncEngine
from specserve.engine.client.recorder import Recorder

__all__ = ["kit_on_path", "scripted_server", "tiny"]


@pytest.fixture
async def start(tiny: Path, kit_on_path: None) -> AsyncIterator[Callable[..., Awaitable[AsyncEngine]]]:
    """`start(**config fields)`: an engine, closed when the test ends."""
    engines = []

    async def start(core: str = SCRIPTED_CORE, ledger: Recorder | None = None, **fields: object) -> AsyncEngine:
        config = EngineConfig(**{"model": str(tiny / "model"), **fields})
        engine = AsyncEngine(config, core=core, recorder=ledger)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.close()
