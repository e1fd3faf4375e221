"""Warming up runs every model and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specserve.core.sampling_params import SamplingParams
from specserve.llm import LLM
from specserve.runtime import warm_up as module
from specserve.runtime.model_state import ModelState
from specserve.runtime.warm_up import warm_up

Open = Callable[..., LLM]


def test_it_leaves_nothing_behind(open_llm: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_llm()
    runner, core = llm.engine.built.runner, llm.engine
    prompts, params = [[5, 6, 7, 8, 9] * 3, [3, 1]], SamplingParams(temperature=0.0, max_tokens=12)
    before = [out.token_ids for out in llm.generate(prompts, params, lora="a0")]
    rows = [runner.rows.num_tokens.clone(), runner.rows.history.clone(), runner.rows.block_tables.clone()]
    monkeypatch.setattr(module, "MAX_TOKENS", 64)
    seen: list[tuple[ModelState, int]] = []
    plain = ModelState.forward

    def noting(state: ModelState, *args: object, **kwargs: object) -> object:
        seen.append((state, len(args[1].token_rows)))  # type: ignore[attr-defined]
        return plain(state, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelState, "forward", noting)
    warm_up(runner.states, runner.rows, max_tokens=200, max_context=core.ready.max_model_len, with_adapters=True)
    assert {tokens for _, tokens in seen} == {68, 136, 200} and {id(state) for state, _ in seen} == {
        id(state) for state in runner.states
    }
    runner.warm_up_sampling(runner.rows.padding_row, drafts=True)
    after = [runner.rows.num_tokens, runner.rows.history, runner.rows.block_tables]
    assert all((one == other).all() for one, other in zip(rows, after, strict=True))
    assert [out.token_ids for out in llm.generate(prompts, params, lora="a0")] == before
