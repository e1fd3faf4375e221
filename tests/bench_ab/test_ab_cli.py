"""`specserve bench ab` as a user types it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specserve.bench.kept import read_comparison
from specserve.cli.main import main
from specserve.config import DEMO_ROOT

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
PROMPTS = ["--dataset-name", "custom", "--dataset-path", str(DEMO_ROOT / "prompts.jsonl")]
DEADLINE = 300.0  # seconds for what must happen; a failure then, not a hang


def side(*flags: str) -> str:
    return shlex.join([sys.executable, str(FAKE_ENGINE), "--port", "{port}", *flags])


def command(folder: Path, a: str, b: str, *flags: str) -> list[str]:
    program = [sys.executable, "-m", "specserve.cli.main", "bench", "ab", "--output", str(folder), *PROMPTS]
    return [*program, "--a", a, "--b", b, "--concurrency", "2", "--requests", "6", "--output-len", "8", *flags]


def ab(folder: Path, a: str, b: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, a, b, *flags), capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_a_comparison_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = ab(tmp_path / "out", side("--token-seconds", "0.03"), side("--token-seconds", "0.002"), "--rounds", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Starting A (")
    assert done.stdout.startswith("B is ")
    assert "concurrency 2 (18 pairs in 3 rounds)" in done.stdout
    assert "18 of 18 answers have the same text on both sides (100%)." in done.stdout
    runs = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert len(runs) == 6
    assert (tmp_path / "out" / "logs" / "A-1.log").exists()
    assert "B is " in (tmp_path / "out" / "report.html").read_text()
    assert list((tmp_path / "out").glob("*.png"))
    capsys.readouterr()
    again = ["bench", "report", str(tmp_path / "out"), "--output", str(tmp_path / "again"), "--goodput", "e2el:239"]
    assert main(again) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == done.stdout.splitlines()[0]
    goodput = next(line for line in told.splitlines() if line.startswith("goodput, requests/s "))
    assert float(goodput.split()[2]) == 0 < float(goodput.split()[3])  # 240 ms and 16 ms a request, or more
    assert (tmp_path / "again" / "report.html").exists()


def test_a_file_of_three_compares_two_with_the_first(tmp_path: Path) -> None:
    sides = {"first": side(), "second": side("--token-seconds", "0.004"), "third": side("--wrong-after", "2")}
    path = tmp_path / "variants.yaml"
    path.write_text(json.dumps({"variants": sides}))  # which is YAML too
    program = [sys.executable, "-m", "specserve.cli.main", "bench", "ab", "--output", str(tmp_path / "out"), *PROMPTS]
    words = [*program, "--variants", str(path), "--rates", "20", "--requests", "4", "--rounds", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 requests/s (8 pairs in 2 rounds)") == 2
    second, third = done.stdout.split("third: ")
    assert "8 of 8 answers" in second
    assert "0 of 8 answers" in third


def test_what_adapters_cost_is_measured_and_drawn(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "specserve.cli.main", "bench", "ab", "--output", str(tmp_path / "out")]
    flags = ["--tokenizer", str(DEMO_ROOT / "target"), "--input-len", "4", "--output-len", "8", "--requests", "4"]
    flags += ["--concurrency", "2", "--rounds", "2", "--lora-modules", "x", "y", "--adapters", "0,2"]
    words = [*program, "--a", side(), "--b", side("--token-seconds", "0.004"), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert "concurrency 2, 0 adapters (8 pairs in 2 rounds)" in done.stdout
    assert (tmp_path / "out" / "overhead-adapters.png").exists()
    runs = read_comparison(tmp_path / "out").runs
    asked = {run.load["adapters"]: {one.adapter for each in runs if each.load == run.load for one in each.requests}
             for run in runs}  # fmt: skip
    assert asked[0] == {None} and asked[2] <= {"x", "y"} and None not in asked[2]


def test_different_texts_are_shown(tmp_path: Path) -> None:
    done = ab(tmp_path / "out", side(), side("--wrong-after", "3"), "--rounds", "1", "--api-key", "secret")
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "report.jsonl", "about.json"):
        assert "secret" not in (tmp_path / "out" / name).read_text()
    assert "0 of 6 answers have the same text on both sides (0%); the first difference is in request 6" in done.stdout
    assert "A goes on with 'w3 w4" in done.stdout
    assert "B goes on with 'other other" in done.stdout


def test_a_side_that_dies_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    done = ab(tmp_path / "out", side(), side("--die-after", "15"), "--rounds", "3")
    assert done.returncode == 1
    assert "The comparison did not finish: B (" in done.stderr
    assert "the fake engine dies (log: " in done.stderr
    assert "what was measured by then" in done.stderr
    assert "The measurement was cut short" in done.stdout
    assert "The comparison did not finish: B (" in (tmp_path / "out" / "report.html").read_text()
    assert "concurrency 2 (" in done.stdout


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Callable[[signal.Signals], tuple[int, str, str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(number: signal.Signals) -> tuple[int, str, str]:
        """Signalled when a first pair of runs is kept: its (exit status, stdout, stderr)."""
        slow = side("--token-seconds", "0.02", "--child", str(tmp_path / "child"))
        words = command(tmp_path / "out", slow, side("--token-seconds", "0.02"), "--rounds", "50")
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        runs, end = tmp_path / "out" / "runs.jsonl", time.monotonic() + DEADLINE
        while not runs.exists() or len(runs.read_text().splitlines()) < 3:
            assert time.monotonic() < end and started[0].poll() is None, "nothing was measured"
            time.sleep(0.02)
        started[0].send_signal(number)
        out, err = started[0].communicate(timeout=DEADLINE)
        return started[0].returncode, out, err

    yield run
    for process in started:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_reports_what_there_is(
    interrupted: Callable[[signal.Signals], tuple[int, str, str]],
    gone: Callable[[int], bool],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    status, out, err = interrupted(number)
    assert status == 130
    assert "did not finish: it was interrupted; what was measured by then" in err
    assert "Traceback" not in err
    assert "concurrency 2 (" in out
    assert gone(int((tmp_path / "child").read_text()))
    variants = {json.loads(line)["variant"] for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()}
    assert variants == {"A", "B"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--a", ""], 'Name both sides, say --a "" --b'),
        (["--a", "http://h:1", "--b", "http://h:1/"], "Two sides are the same server"),
        (["--a", "./x", "--b", ""], "write another server's port as {port}"),
        (["--a", "", "--b", "", "--rounds", "0"], "0' is not a positive number"),
        (["--a", "", "--b", "", "--concurrency", "x"], "'x' is not numbers with commas between"),
        (["--a", "", "--b", "", "--goodput", "x:1"], "is not NAME:MILLISECONDS"),
        (["--variants", "/nonexistent.yaml"], "/nonexistent.yaml: No such file"),
        (["--variants", "v.yaml", "--a", ""], "leave --a and --b out"),
        (["--a", "", "--b", "", "--dataset-name", "sharegpt"], "--dataset-path is needed"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["bench", "ab", *flags])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_results_of_another_comparison_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.jsonl").touch()
    assert main(["bench", "ab", "--output", str(tmp_path)]) == 2
    assert "is not empty: name another folder" in capsys.readouterr().err


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "holds no comparison: about.json: No such file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_models_end_to_end(tmp_path: Path) -> None:
    """Drafts change no text, and how many were accepted is told."""
    program = [sys.executable, "-m", "specserve.cli.main", "bench", "ab", "--output", str(tmp_path / "out")]
    flags = ["--concurrency", "1,4", "--rounds", "2", "--output-len", "24"]
    words = [*program, "--a", "", "--b", "--draft-model demo", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert "answers have the same text on both sides (100%)." in done.stdout
    assert done.stdout.count("Drafts accepted") == 2
    found = read_comparison(tmp_path / "out")
    records = [(run.variant, record) for run in found.runs for record in run.requests]
    assert all(record.error is None for _, record in records)
    assert {record.adapter for _, record in records} == {None, "sql", "javascript", "docs"}
    assert not any(sum(record.drafted_per_position) for variant, record in records if variant == "A")
    assert sum(sum(record.accepted_per_position) for variant, record in records if variant == "B") > 100
    assert [info.server["engine"] for info in found.variants] == ["specserve", "specserve"]
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") >= 3
