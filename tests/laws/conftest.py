"""Models and truths, built once a session and worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest

from lawbook.cases import Case
from lawbook.engines import Plain, case_engine
from lawbook.zoo import Zoo, build_zoo
from specserve.llm import LLM


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    """Family name → its models and adapters on disk."""
    root = tmp_path_factory.mktemp("zoo")
    return cache(lambda family: build_zoo(family, root))


@pytest.fixture(scope="session")
def plain(zoo: Callable[[str], Zoo]) -> Plain:
    return Plain(zoo)


@pytest.fixture
def open_case(zoo: Callable[[str], Zoo]) -> Iterator[Callable[..., LLM]]:
    """`open_case(case, script, **config fields)`: an engine for the case, closed when the test ends."""
    opened: list[LLM] = []

    def open_case(case: Case, script: Sequence[tuple[int, ...]] = (), **fields: object) -> LLM:
        opened.append(case_engine(zoo(case.family), case, script, **fields))
        return opened[-1]

    yield open_case
    for llm in opened:
        llm.engine.close()
