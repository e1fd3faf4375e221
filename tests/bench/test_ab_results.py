"""Comparisons among the results: the same figures, no places of a machine, and pictures from them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.ab_pictures import main
from benchmarks.ab_results import ROOT, keep, without_places
from specserve.bench.compare import comparisons
from specserve.bench.kept import ABOUT, RUNS, read_comparison
from specserve.bench.records import Comparison, Event, RequestRecord, RunRecord, VariantInfo

pytest.importorskip("matplotlib")


def _request(index: int, pace: float) -> RequestRecord:
    events = [Event(0.1234567 + pace * place, 1) for place in range(4)]
    return RequestRecord(
        index, 0.0123456, events, events[-1].time, 3, 4, "one two three four", "length",
        drafted_per_position=[2], accepted_per_position=[index % 3],
    )  # fmt: skip


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a comparison leaves of two servers, the second one twice as fast a token, at two loads."""
    program = ["/elsewhere/bin/python", "-m", "specserve.cli.main", "serve", f"{ROOT}/specserve/demo/target"]
    infos = [VariantInfo(name, name, [*program, f"--lora=x={ROOT}/some/adapter"], url="http://here:1") for name in "AB"]
    runs = [
        RunRecord(name, number, {"concurrency": load}, 1.0, [_request(i, pace * (1 + 0.01 * i)) for i in range(8)])
        for number in range(3) for load in (1, 4) for name, pace in (("A", 0.0200001), ("B", 0.01))
    ]  # fmt: skip
    facts = {"command": ["specserve", "bench", "ab", "--output", "/home/somebody/ab"], "notes": ["log: /home/x/B.log"]}
    folder = tmp_path / "left"
    folder.mkdir()
    (folder / ABOUT).write_bytes(msgspec.json.encode(Comparison(infos, [], facts)))
    (folder / RUNS).write_bytes(msgspec.json.Encoder().encode_lines(runs))
    return folder


def test_places_become_names() -> None:
    words = ["/a/python", "serve", "/w/r/demo", "--lora", "x=/w/r/lora/x", "--y=/z/b", "--rates", "2,8", "http://h:1/v"]
    assert without_places(words, Path("/w/r")) == [
        "python", "serve", "demo", "--lora", "x=lora/x", "--y=b", "--rates", "2,8", "http://h:1/v",
    ]  # fmt: skip
    facts = {
        "n": 3,
        "requests": {"path": "/w/r/demo/p.jsonl"},
        "notes": ["B ended: no room (log: /tmp/ab/logs/B-1.log)."],
    }
    assert without_places(facts, Path("/w/r")) == {
        "n": 3, "requests": {"path": "demo/p.jsonl"}, "notes": ["B ended: no room (log: B-1.log)."],
    }  # fmt: skip


def test_what_is_kept_tells_the_same_without_places(left: Path, tmp_path: Path) -> None:
    paths = keep(left, tmp_path / "kept", figures=False)
    written = b"".join(path.read_bytes() for path in paths).decode()
    assert all(place not in written for place in (str(ROOT), "/elsewhere", "/home", "http://here"))
    (before,), (after,) = comparisons(read_comparison(left)), comparisons(read_comparison(tmp_path / "kept"))
    for old, new in zip(before.loads, after.loads, strict=True):
        assert old.load == new.load
        for metric, ratio in old.ratios.items():
            assert new.ratios[metric].ratio == pytest.approx(ratio.ratio, rel=2e-3), metric
    assert after.equality == before.equality
    assert (tmp_path / "kept" / RUNS).stat().st_size < (left / RUNS).stat().st_size


def test_figures_alone_have_no_runs(left: Path, tmp_path: Path) -> None:
    paths = keep(left, tmp_path / "kept", figures=True)
    assert sorted(path.name for path in paths) == ["about.json", "report.jsonl"]
    kinds = {msgspec.json.decode(line)["kind"] for line in paths[1].read_bytes().splitlines()}
    assert {"facts", "summary", "ratio", "verdict"} <= kinds


def test_pictures_are_drawn_for_both_pages(left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images"
    assert main([str(left), "--out", str(out)]) == 0
    names = ["ab-alpha-dark.png", "ab-alpha.png", "ab-speedup-dark.png", "ab-speedup.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())
    assert len({path.read_bytes() for path in out.iterdir()}) == 4
    assert "B is" in capsys.readouterr().out


def test_nothing_to_draw_from_is_told(left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    (left / RUNS).unlink()
    assert main([str(left), "--out", str(tmp_path)]) == 1
    assert "has no runs for: speedup, alpha" in capsys.readouterr().out
