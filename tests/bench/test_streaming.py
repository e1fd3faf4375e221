"""The streaming benchmarks count what came: their clients against events whose content is known, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import over_http
from benchmarks.over_http import steady_rate
from benchmarks.streaming import Setting, measure
from benchmarks.streaming_client import Counts
from benchmarks.streaming_core import word_ids
from specserve.config import DEMO_ROOT
from specserve.engine.client.sequence import Delta
from specserve.engine.client.tokenizer import Tokenizer
from specserve.server import chat, completions
from specserve.server.answer import Answer

TOKENIZER = Tokenizer.load(str(DEMO_ROOT / "target"))
VOCAB = 4096


@pytest.mark.parametrize("dialect", [chat._dialect(TOKENIZER), completions._dialect(TOKENIZER)])
@given(steps=st.lists(st.integers(0, 4), min_size=1, max_size=9), size=st.integers(1, 50))
def test_counting_needs_no_parsing(dialect: Any, steps: list[int], size: int) -> None:
    answer = Answer(dialect, "demo", include_usage=False, return_token_ids=False)
    sent = []
    for count in steps:
        event = answer.event(Delta(0, " word" * count, [1] * count, None, []))
        sent.append(b"%x\r\n%b\r\n" % (len(event), event))
    data, counts = b"".join(sent), Counts()
    for start in range(0, len(data), size):
        counts.add(data[start : start + size])
    assert counts == Counts(len(steps), sum(steps), len(data))


def test_words_bring_one_space_each() -> None:
    words = word_ids(TOKENIZER.decode, VOCAB)
    text = TOKENIZER.decode(words)
    assert text.count(" ") == len(words)
    assert all(word.isascii() and word.isalpha() for word in text.split())
    with pytest.raises(ValueError, match="another model"):
        word_ids(TOKENIZER.decode, 300)


def test_steady_rate_counts_where_all_decode() -> None:
    """One stream ends at 5 s, the other begins at 2 s: of 3 s count 3 × 1 and 3 × 2 tokens."""
    early = [(float(second), 1) for second in range(6)]
    late = [(float(second), 2) for second in range(2, 12)]
    assert steady_rate([early, late]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="more new tokens"):
        steady_rate([early[:2], late])


@pytest.mark.slow
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_run_through_the_server(is_chat: bool) -> None:
    row = measure(Setting(streams=6, tokens=3, step_ms=20.0, clients=2, seconds=1.0, chat=is_chat, model="demo"))
    assert row["tokens_per_event"] >= 3.0  # type: ignore[operator]
    assert row["kept"] > 0 and row["events_per_s"] > 0  # type: ignore[operator]


@pytest.mark.slow
def test_a_comparison_with_the_engine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    asked = f"over_http --batches 1,3 --drafts 0,2 --new 24 --prompt 8 --rounds 1 --clients 2 --out {out}"
    monkeypatch.setattr("sys.argv", asked.split())
    over_http.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["batch"], row["drafts"]) for row in rows] == [(1, 0), (3, 0), (1, 2), (3, 2)]
    assert all(row["tok_s_http"] > 0 and row["kept_low"] <= row["kept"] <= row["kept_high"] for row in rows)
