"""The report: what is drawn is what was measured, it needs no other file, and it is made of whatever there is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from specserve.bench.compare import comparisons
from specserve.bench.gains import gains
from specserve.bench.metrics import Slos, summarise
from specserve.bench.records import Comparison, Event, RequestRecord, RunRecord, VariantInfo
from specserve.bench.report.drafts import drafts
from specserve.bench.report.latencies import latencies
from specserve.bench.report.overhead import lines
from specserve.bench.report.pictures import pictures_of
from specserve.bench.report.theme import DARK, LIGHT, NARROW, Palette, inline_svg
from specserve.bench.report.write import write_report
from specserve.bench.verdict import verdict

FACTS = {"date": "2026-01-02T03:04:05+00:00", "command": ["specserve", "bench"], "notes": ["It was <interrupted>."]}
LOADS = [{"concurrency": 1}, {"concurrency": 4}, {"concurrency": 16}]
Fakes = Callable[..., Any]


def with_drafts(comparison: Comparison) -> Comparison:
    """B drafted for two adapters and the base model."""

    def told(record: RequestRecord) -> RequestRecord:
        adapter = (None, "sql", "math")[record.index % 3]
        return msgspec.structs.replace(
            record, adapter=adapter, drafted_per_position=[8, 8, 4], accepted_per_position=[6, 4, record.index % 3]
        )

    runs = [
        msgspec.structs.replace(run, requests=[told(record) for record in run.requests]) if run.variant == "B" else run
        for run in comparison.runs
    ]
    return msgspec.structs.replace(comparison, runs=runs)


def drawn(comparison: Comparison) -> dict[str, Any]:
    """Figures by the names of their pictures."""
    return {one.name: one.draw(LIGHT) for one in pictures_of(comparison, comparisons(comparison))}


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loaded.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(fake: Fakes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    comparison = with_drafts(fake(requests=12).comparison(1, LOADS))
    told = VariantInfo("B", "<draft> & more", ["serve", "--x", "<y>"])
    comparison = msgspec.structs.replace(comparison, variants=[comparison.variants[0], told], facts=FACTS)
    folder = tmp_path_factory.mktemp("report")
    written = write_report(comparison, folder, Slos(e2el=500))
    assert written.missing is None
    return folder, written.html.read_text()


def test_the_page_needs_no_other_file_and_no_script(report: tuple[Path, str]) -> None:
    _, text = report
    page = Page(text)
    assert page.loaded == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(http" not in text and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert reference in page.ids


def test_the_page_says_at_once_who_wins(report: tuple[Path, str]) -> None:
    folder, text = report
    page = Page(text)
    verdicts = [row["verdict"] for row in rows(folder) if row["kind"] == "verdict"]
    assert len(verdicts) == 1
    assert page.text.index(verdicts[0]) < page.text.index("E2EL mean") < page.text.index("Pictures")
    assert re.search(r"<h1>B is [^(]*<small>\(95 %: [^<]*\)</small>", text)
    assert page.text.index("ITL: from one event") < page.text.index("Pictures")  # drafts were accepted
    assert page.tags.count("figure") == 6
    assert "the first 100.0% of a text" not in page.text
    assert "answers of A and B are the same text (100.0%)" in page.text


def test_what_users_wrote_is_escaped(report: tuple[Path, str]) -> None:
    _, text = report
    assert "<draft>" not in text and "<y>" not in text
    assert "<draft> & more" in Page(text).text
    assert "It was <interrupted>." in Page(text).text.partition("Pictures")[0]


def test_colours_of_pictures_follow_the_page(report: tuple[Path, str]) -> None:
    _, text = report
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", pictures)) <= set(re.findall(r"(--[a-z0-9-]+):", text))
    assert not re.findall(r"(?:fill|stroke): ?#(?!000000|ffffff)", pictures)


def test_both_themes_are_written(report: tuple[Path, str]) -> None:
    folder, _ = report
    names = ["speedup-b", "throughput", "alpha-b", "latencies", "acceptance-position", "acceptance-adapter"]
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(
        f"{name}{ending}.png" for name in names for ending in ("", "-dark")
    )
    assert (folder / "latencies.png").read_bytes() != (folder / "latencies-dark.png").read_bytes()


def test_a_phone_gets_pictures_of_its_width(report: tuple[Path, str]) -> None:
    _, text = report
    wide = re.findall(
        r'<figure class="wide"><div class="broad">(.*?)</div><div class="narrow">(.*?)</div>', text, re.DOTALL
    )
    assert len(wide) == text.count('<figure class="wide">') == 4
    assert all(width(narrow) <= NARROW * 72 < width(broad) for broad, narrow in wide)
    assert all(
        width(svg) <= 5 * 72 for svg in re.findall(r"<figure>(<svg.*?</svg>)", text, re.DOTALL)
    )  # the others stay


def width(svg: str) -> float:
    found = re.search(r'viewBox="0 0 ([0-9.]+) ', svg)
    assert found is not None
    return float(found[1])


def test_a_phone_sees_all_that_others_see(fake: Fakes) -> None:
    comparison = with_drafts(fake(requests=12).comparison(3, LOADS))
    for picture in pictures_of(comparison, comparisons(comparison)):
        broad, narrow = (picture.draw(LIGHT, narrow=narrow) for narrow in (False, True))
        seen = [
            [list(line.get_ydata()) for axes in figure.axes if axes.get_visible() for line in axes.get_lines()]
            for figure in (broad, narrow)
        ]
        assert seen[0] == seen[1]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def test_rows_hold_all_that_was_found_out(report: tuple[Path, str]) -> None:
    folder, _ = report
    kinds = [row["kind"] for row in rows(folder)]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts.pop("ratio") == 3 * (16 + 4)
    assert counts.pop("by_acceptance") == 3 * 4
    assert counts == {"facts": 1, "summary": 6, "acceptance": 3, "break_even": 1, "equality": 1, "verdict": 1}
    for row in rows(folder):
        if row["kind"] in ("ratio", "by_acceptance") and row["low"] is not None:
            assert row["low"] <= row["speedup"] <= row["high"]


def test_the_same_runs_give_the_same_files(fake: Fakes, tmp_path: Path) -> None:
    comparison = fake(rounds=2, requests=5).comparison(2)
    for name in "ab":
        write_report(comparison, tmp_path / name)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_the_style_sheet_has_the_palettes_colours_which_can_be_read(palette: Palette) -> None:
    style = files("specserve.bench.report").joinpath("style.css").read_text()
    block = style.split("@media (prefers-color-scheme: dark)")[palette is DARK]
    for colour, name in palette.names().items():
        assert f"{name[4:-1]}: {colour};" in block
        if "page" not in name and "grid" not in name:
            assert contrast(colour, palette.page) >= 3, name  # WCAG 2, 1.4.11
    assert len(palette.names()) == 6 + len(palette.series)  # all differ


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_lines_are_what_was_measured(fake: Fakes) -> None:
    comparison = with_drafts(fake(requests=12).comparison(3, LOADS))
    (compared,) = comparisons(comparison)
    figures = drawn(comparison)
    (line,) = [one for one in figures["speedup-b"].axes[0].get_lines() if len(one.get_xdata()) == 3]
    assert list(line.get_xdata()) == [1, 4, 16]
    assert list(line.get_ydata()) == [at.headline.speedup for at in compared.loads if at.headline]
    (ours,) = [one for one in figures["throughput"].axes[0].get_lines() if one.get_label() == "B"]
    assert list(ours.get_ydata()) == [at.b.output_throughput for at in compared.loads]
    e2el = figures["latencies"].axes[3].get_lines()[1]  # of A at concurrency 1: marks at p50, p90 and p99
    expected = compared.loads[0].a.e2el
    assert expected is not None
    assert list(e2el.get_xdata()) == pytest.approx([expected.median, expected.p90, expected.p99])
    (position,) = figures["acceptance-position"].axes[0].get_lines()
    assert list(position.get_ydata()) == pytest.approx([0.75, 0.5, summarised(comparison).per_position[2]])


def summarised(comparison: Comparison) -> Any:
    return summarise([run for run in comparison.runs if run.variant == "B"]).acceptance


def test_acceptance_by_adapter_has_a_bar_for_each(fake: Fakes) -> None:
    comparison = with_drafts(fake(requests=12).comparison(4))
    figure = {one.name: one for one in drafts(comparison)}["acceptance-adapter"].draw(LIGHT)
    (axes,) = figure.axes
    bars = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.patches, strict=True))
    assert {name: bar.get_width() for name, bar in bars.items()} == pytest.approx(
        {"(base model)": 10 / 20, "sql": 11 / 20, "math": 12 / 20}
    )


def test_overhead_is_over_the_fewest_adapters(fake: Fakes) -> None:
    def runs(number: int, rank: int, cost: float) -> list[RunRecord]:
        quiet = {"drift": 0.0, "block": 0.0, "request": 0.0, "noise": 0.0, "rounds": 2, "requests": 6}
        found = fake(**quiet).runs(5, {"adapters": number, "rank": rank})
        return [msgspec.structs.replace(run, requests=[slower(one, cost) for one in run.requests]) for run in found]

    def slower(one: RequestRecord, cost: float) -> RequestRecord:
        events = [msgspec.structs.replace(event, time=event.time * cost) for event in one.events]
        return msgspec.structs.replace(one, events=events)

    cells = {(0, 8): 1.0, (4, 8): 1.1, (0, 64): 1.0, (4, 64): 1.5}
    comparison = Comparison(
        [VariantInfo("A", ""), VariantInfo("B", "")], [run for cell, cost in cells.items() for run in runs(*cell, cost)]
    )
    found = {line.name: line.points for line in lines(comparison, "adapters")}
    for line in lines(comparison, "adapters"):  # both rounds are alike
        assert np.asarray(line.rounds) == pytest.approx(np.asarray([line.points] * 2))
    assert list(found) == ["A, rank 8", "A, rank 64", "B, rank 8", "B, rank 64"]
    for variant in "AB":
        assert found[f"{variant}, rank 8"] == [(0.0, 1.0), (4.0, pytest.approx(1.1))]
        assert found[f"{variant}, rank 64"] == [(0.0, 1.0), (4.0, pytest.approx(1.5))]
    assert {"overhead-adapters", "overhead-rank"} < set(drawn(comparison))
    short = msgspec.structs.replace(comparison, runs=comparison.runs[:-1])  # of the last round a load is missing
    assert [len(line.rounds) for line in lines(short, "adapters")] == [2, 2, 2, 1]
    drawn(short)
    (compared,) = comparisons(comparison)
    assert verdict(compared).startswith("B is 1.25× as fast as A at all 4 loads (best: ")


@pytest.mark.parametrize("drafter", ["A", "B"])
def test_speedup_by_acceptance_is_of_requests_of_like_acceptance(fake: Fakes, drafter: str) -> None:
    """With 1, 2, 3 and 4 of 4 drafts accepted a token takes that much less time; of a fifth nothing is drafted."""
    gain = {1: 0.9, 2: 1.1, 3: 1.5, 4: 2.0}

    def told(record: RequestRecord) -> RequestRecord:
        accepted = record.index % 5
        if not accepted:
            return record
        events = [Event(1 + (event.time - 1) / gain[accepted], event.tokens) for event in record.events]
        counts = {"drafted_per_position": [2, 2], "accepted_per_position": [accepted // 2, accepted - accepted // 2]}
        return msgspec.structs.replace(record, events=events, **counts)

    quiet = {"drift": 0.0, "block": 0.0, "request": 0.0, "noise": 0.0, "speedup": 1.0, "requests": 40}
    runs = fake(**quiet).runs(11)
    drafted = {id(run): [told(record) for record in run.requests] for run in runs if run.variant == drafter}
    runs = [msgspec.structs.replace(run, requests=drafted.get(id(run), run.requests)) for run in runs]
    found = gains(runs, "A", "B")
    assert found.drafter == drafter
    ((load, points),) = found.lines
    assert load == {"concurrency": 8}
    assert [alpha for alpha, _ in points] == [0.25, 0.5, 0.75, 1.0]
    expected = [value if drafter == "B" else 1 / value for value in gain.values()]
    assert [ratio.speedup for _, ratio in points] == pytest.approx(expected)
    assert gains([run for run in runs if run.round == 0 and run.variant != drafter], "A", "B").lines == []


def test_only_what_there_is_is_drawn(fake: Fakes) -> None:
    assert set(drawn(fake().comparison(6))) == {"speedup-b", "latencies"}
    assert set(drawn(fake().comparison(6, LOADS))) == {"speedup-b", "latencies", "throughput"}
    assert set(drawn(with_drafts(fake().comparison(6)))) == {
        "speedup-b", "latencies", "alpha-b", "acceptance-position", "acceptance-adapter",
    }  # fmt: skip
    (picture,) = latencies(fake().comparison(6))
    assert len(picture.draw(DARK).axes) == 4
    assert 'aria-label="How long requests take"' in inline_svg(picture)


@pytest.mark.parametrize("kept", ["", "A", "B"], ids=["nothing", "A alone", "B alone"])
def test_whatever_was_measured_makes_a_report(fake: Fakes, tmp_path: Path, kept: str) -> None:
    whole = fake().comparison(7, LOADS)
    runs = [run for run in whole.runs if run.variant == kept]
    written = write_report(msgspec.structs.replace(whole, runs=runs), tmp_path)
    text = Page(written.html.read_text()).text
    assert "Nothing to compare: no request was answered by both A and B." in text
    assert bool(written.pictures) == bool(kept)


def test_runs_whose_requests_all_failed_make_a_report(fake: Fakes, tmp_path: Path) -> None:
    refused = [RequestRecord(index, 0.0, [], 1.0, error="refused") for index in range(5)]
    runs = [RunRecord(name, number, {"rate": 2.0}, 1.0, refused) for name in "AB" for number in range(3)]
    written = write_report(msgspec.structs.replace(fake().comparison(8), runs=runs), tmp_path)
    text = Page(written.html.read_text()).text
    assert "15 of 15 requests to A failed" in text
    assert written.pictures == []


def test_many_loads_get_a_small_table_first(fake: Fakes, tmp_path: Path) -> None:
    loads = [{"concurrency": number, "rank": rank} for number in (1, 4, 16, 64) for rank in (0, 8, 64)]
    written = write_report(fake(rounds=3, requests=10).comparison(9, loads), tmp_path)
    text = Page(written.html.read_text()).text
    assert text.index("rank 64") < text.index("Every metric at every load") < text.index("TTFT p50")


def test_without_matplotlib_the_report_says_what_to_install(
    fake: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = write_report(fake().comparison(10), tmp_path)
    assert written.pictures == []
    assert written.missing is not None and "pip install 'specserve[bench]'" in written.missing
    page = Page(written.html.read_text())
    assert written.missing in page.text
    assert "figure" not in page.tags
    assert len(rows(tmp_path)) > 10
