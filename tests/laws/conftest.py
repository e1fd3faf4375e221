"""Models and truths, built once a session and worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest

from lawbook.cases import Case
from lawbook.engines import HERE, case_engine
from lawbook.plain import MAX_EXCUSED, Plain
from lawbook.zoo import Zoo, build_markov_zoo, build_zoo
from specserve.llm import LLM

EXCUSED = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--law-device", default=HERE.device, help="where the engines of the laws compute")
    parser.addoption("--law-dtype", default=HERE.dtype, help="in which dtype; but for float64, near ties are excused")


def pytest_configure(config: pytest.Config) -> None:
    HERE.device = config.getoption("law_device", HERE.device)
    HERE.dtype = config.getoption("law_dtype", HERE.dtype)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not HERE.exact:
        terminalreporter.write_line(config.stash.get(EXCUSED, "no requests compared"))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    """Family name → its models and adapters on disk."""
    root = tmp_path_factory.mktemp("zoo")
    return cache(lambda family: build_zoo(family, root))


@pytest.fixture(scope="session")
def markov(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A target whose next token depends on the last one alone, a draft like it, an adapter with its companion."""
    return build_markov_zoo(tmp_path_factory.mktemp("markov"))


@pytest.fixture(scope="session")
def plain(zoo: Callable[[str], Zoo], request: pytest.FixtureRequest) -> Iterator[Plain]:
    plain = Plain(zoo)
    yield plain
    request.config.stash[EXCUSED] = f"{plain.compared} requests compared, {plain.excused} excused for a near tie"
    if not HERE.exact:
        assert plain.excused <= MAX_EXCUSED * plain.compared


@pytest.fixture
def exact() -> None:
    """For a law, or the part of one, that has no meaning where the dtype rounds."""
    if not HERE.exact:
        pytest.skip("needs float64")


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
