"""The benchmark on real text: its corpus, its arithmetic, and a tiny run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import real_text
from benchmarks.real_text_corpus import BASE_DOMAINS, installed_text

ROOT = Path(__file__).parents[2]


def test_text_is_found_and_split_by_file() -> None:
    documents = installed_text(0.02)
    assert {*BASE_DOMAINS, "cpp"} <= {document.domain for document in documents}
    files = [(document.domain, document.path) for document in documents]
    assert len(files) == len(set(files)), "no file is in both parts"
    assert {document.split for document in documents} == {"train", "held_out"}
    assert [document.path for document in installed_text(0.02)] == [document.path for document in documents]


def cells(own: float, base: float, companion: float) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    def kind(**alphas: float) -> dict[str, dict[str, float]]:
        figures = {who: {"alpha": alpha, "tokens_per_second": 100 * alpha} for who, alpha in alphas.items()}
        return {"no drafts": {"tokens_per_second": 20.0}, **{who.replace("_", " "): f for who, f in figures.items()}}

    base_kinds, kinds = kind(base_draft=own), kind(base_draft=base, companion=companion, no_adapter=own)
    return {"python": {"greedy": base_kinds, "sampled": base_kinds}, "cpp": {"greedy": kinds, "sampled": kinds}}


def test_the_share_won_back() -> None:
    base, cpp = real_text.rows(cells(0.8, 0.4, 0.7), {})
    assert "won_back" not in base
    assert base["speedup"]["greedy"] == {"base draft": 4.0}
    assert cpp["speedup"]["sampled"] == {"base draft": 2.0, "companion": 3.5}
    assert real_text.won_back(cells(0.8, 0.4, 0.7)["cpp"]["sampled"]) == 0.75
    assert real_text.won_back(cells(0.8, 0.4, 0.3)["cpp"]["sampled"]) == -0.25
    assert real_text.won_back(cells(0.8, 0.795, 0.9)["cpp"]["sampled"]) is None


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.real_text", str(tmp_path), "--tiny"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["domain"] == "python"
    assert rows[0]["made"]["weights"] == rows[0]["made"]["draft_weights"] == "float32"
    assert "cpp" in [row["domain"] for row in rows]
    for row in rows[1:]:
        assert set(row["cells"]["greedy"]) == {"no drafts", "base draft", "companion", "no adapter"}
        assert 0 <= row["cells"]["sampled"]["companion"]["alpha"] <= 1
        assert (tmp_path / "adapters" / row["domain"] / "draft" / "adapter_model.safetensors").exists()
