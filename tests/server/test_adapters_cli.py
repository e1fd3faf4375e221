"""`specserve adapters …` against a running server."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serverkit.processes import Server
from specserve.cli.main import main
from specserve.cli.progress import call_each
from specserve.cli.tables import SORTS, age, size, table

Run = Callable[..., str]


@pytest.fixture
def two(scripted_server: Server, tiny: Path) -> Iterator[str]:
    """The path of an adapter that may be loaded; whatever was loaded beside `one` and `failing` is gone afterwards."""
    yield str(tiny / "adapters" / "two")
    for info in scripted_server.request("GET", "/v1/adapters")[1]["data"]:
        if info["name"] not in ("one", "failing"):
            scripted_server.request("DELETE", f"/v1/adapters/{info['name']}")


@pytest.fixture
def run(scripted_server: Server, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `adapters ARGS…` to its end; gives what it printed."""

    def run(*args: str, status: int = 0) -> str:
        assert main(["adapters", *args, "--url", scripted_server.url]) == status
        out, err = capsys.readouterr()
        return out + err if status else out

    return run


def rows(text: str) -> dict[str, dict[str, str]]:
    """{name: {column: cell}}."""
    head, *lines = (line.split() for line in text.splitlines())
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_life(run: Run, two: str) -> None:
    loaded = rows(run("load", "two", two, "--pinned", "--weight", "2.5"))["two"]
    assert (loaded["PINNED"], loaded["WEIGHT"], loaded["SIZE"], loaded["TIER"]) == ("yes", "2.5", "1.0kB", "host")
    assert rows(run("unpin", "two"))["two"]["PINNED"] == "no"
    assert rows(run("pin", "two", "one"))["two"]["PINNED"] == "yes"
    assert rows(run("unpin", "one"))["one"]["PINNED"] == "no"
    replaced = rows(run("load", "two", two, "--replace", "--draft-path", two))["two"]
    assert (replaced["DRAFT"], replaced["PINNED"], replaced["WEIGHT"]) == ("yes", "yes", "2.5")
    assert rows(run("reload", "two", "one")).keys() == {"two", "one"}
    assert {"one", "two", "failing"} <= set(rows(run("list")))
    assert run("unload", "two") == "Unloaded two.\n"
    assert "two" not in rows(run("list"))


def test_several_and_those_that_fail(run: Run, two: str, tmp_path: Path) -> None:
    """What can be loaded is; each failure names its adapter and comes at the end."""
    said = run("load", f"a={two}", f"b={two}-missing", f"c={two}", f"one={two}", f"e={tmp_path}", status=1)
    text, errors = said.split("specserve: ", 1)
    assert rows(text).keys() == {"a", "c"}
    assert f"'b': {two}-missing is no folder." in errors
    assert "'one' is loaded already" in errors
    assert "specserve adapters reload one" in errors
    assert "'e': path" in errors
    assert "--adapter-root" in errors
    assert errors.endswith("3 of 5 adapters failed.\n")
    assert run("unload", "a", "nope", "c", status=1).startswith("Unloaded a, c.\n")


def test_a_folder_of_adapters(run: Run, two: str, tiny: Path) -> None:
    root = tiny / "adapters" / "many"
    for name in ("x", "y", "z"):
        shutil.copytree(two, root / name)
    try:
        assert list(rows(run("load", "--all", str(root)))) == ["x", "y", "z"]
        assert "'x' is loaded already" in run("load", "--all", str(root), status=1)
        assert list(rows(run("load", "--all", str(root), "--replace"))) == ["x", "y", "z"]
        (root / "empty").mkdir()
        assert "these do not: empty" in run("load", "--all", str(root), status=1)
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name adapters as NAME PATH"),
        (["two"], "'two' is not NAME=PATH"),
        (["a", "b", "c"], "'a' is not NAME=PATH"),
        (["a=/x", "a=/x"], "'a' is named more than once"),
        (["--all", "/nonexistent"], "'/nonexistent' cannot be listed"),
        (["a=/x", "b=/y", "--draft-path", "/z"], "--draft-path goes with one adapter"),
    ],
)
def test_loads_that_name_nothing(run: Run, args: list[str], said: str) -> None:
    assert said in run("load", *args, status=1)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1001", "much"])
def test_bad_weight_exits_with_2(weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["adapters", "load", "a", "/x", f"--weight={weight}"])
    assert raised.value.code == 2
    assert "--weight" in capsys.readouterr().err


def test_list_sorted_cut_and_as_json(run: Run, two: str, scripted_server: Server) -> None:
    run("load", f"b={two}", f"a={two}")
    for _ in range(3):
        scripted_server.request("POST", "/v1/completions", {"model": "b", "prompt": "x", "max_tokens": 1})
    assert list(rows(run("list", "--sort", "name")))[:2] == ["a", "b"]
    infos: list[dict[str, Any]] = json.loads(run("list", "--json", "--sort", "requests"))
    requests = [info["requests"] for info in infos]
    assert requests == sorted(requests, reverse=True)
    assert {"tier", "slot", "rank", "num_bytes", "weight", "version", "requests", "tokens", "acceptance", "last_used",
            "running", "state", "path", "pinned", "has_draft"} <= infos[0].keys()  # fmt: skip
    assert json.loads(run("list", "--json", "--tier", "device")) == []
    assert len(rows(run("list", "--limit", "1"))) == 1


def test_cells() -> None:
    assert [size(value) for value in (0, 999, 1000, 84_123_456, 999_960_000, 5.4e9)] == [
        *("0B", "999B", "1.0kB", "84.1MB", "1.0GB", "5.4GB")
    ]
    assert [age(value) for value in (-0.1, 0.5, 59.9, 200, 7200, 200_000)] == ["now", "now", "59s", "3min", "2h", "2d"]
    info = {
        "name": "a", "tier": "disk", "state": "reading", "slot": None, "rank": None, "num_bytes": None, "weight": 1.0,
        "pinned": False, "has_draft": None, "running": 0, "requests": 2, "tokens": 0, "acceptance": None,
        "last_used": None, "version": "",
    }  # fmt: skip
    unread = rows(table([info]))["a"]
    assert unread["TIER"] == "disk/reading"
    assert (unread["RANK"], unread["SIZE"], unread["DRAFT"], unread["VERSION"]) == ("-", "-", "-", "-")
    read = info | {"name": "b", "rank": 8, "num_bytes": 1000, "has_draft": False, "version": "0123456789abcdef"}
    assert [one["name"] for one in sorted([info, read], key=SORTS["size"])] == ["b", "a"]
    cells = rows(table([info, read]))["b"]
    assert (cells["RANK"], cells["SIZE"], cells["DRAFT"], cells["VERSION"]) == ("8", "1.0kB", "no", "0123456789ab")


class Terminal:
    """A stderr that says it is one."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = {name: lambda: None for name in "ab"}
    assert call_each("Loading", calls) == ({"a": None, "b": None}, {})
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    call_each("Loading", calls)
    assert "Loading" in terminal.text
    assert "2 adapters" in terminal.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
@pytest.mark.parametrize("args", [["list"], ["load", "a=/x", "b=/y", "c=/z"]])
def test_without_a_server(url: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", *args, "--url", url]) == 1
    err = capsys.readouterr().err
    assert "No specserve server answers" in err
    assert err.count("\n") == 1


def test_what_the_server_said(run: Run) -> None:
    assert run("unload", "no/pe", status=1) == (
        "specserve: The adapter 'no/pe' does not exist; GET /v1/adapters lists those that do.\n"
    )
