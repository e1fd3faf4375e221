"""Attention of requests that decode or verify: reads their keys and values once."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.ops.attention import case
from benchmarks.ops.case import Case, Setting

DRAFTS = 4


def cases(setting: Setting) -> Iterator[Case]:
    for context in setting.contexts:
        for rows in setting.rows:
            yield case(setting, f"{rows} at {context}", [(context - 1, 1)] * rows)
    long, shortest, most = 4 * setting.prompt, setting.contexts[0], setting.rows[-1]
    yield case(setting, f"1 at {long}", [(long - 1, 1)])
    yield case(setting, f"{most} at {shortest}, {DRAFTS} drafts", [(shortest - DRAFTS - 1, DRAFTS + 1)] * most)
