"""Attention of prompts: four operations a query, key and dimension of a head."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.ops.attention import case
from benchmarks.ops.case import Case, Setting, count


def cases(setting: Setting) -> Iterator[Case]:
    tokens, part = setting.prompt, setting.prompt // 16
    yield case(setting, count(tokens, "token"), [(0, tokens)])
    yield case(setting, f"{tokens} after {3 * tokens}", [(3 * tokens, tokens)])
    yield case(setting, f"16 of {part}", [(0, part)] * 16)
