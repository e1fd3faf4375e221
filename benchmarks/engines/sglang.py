"""SGLang's offline `Engine`, with the options that measured best for it (SGLang 0.5.17)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.engines import Setup


class SglangEngine:
    """SGLang takes adapters or a draft model, not both."""

    def __init__(self, setup: Setup) -> None:
        if setup.mode.loras and setup.mode.speculates:
            raise SystemExit("SGLang refuses adapters together with a draft model.")
        from sglang import Engine  # noqa: PLC0415

        self.engine: Any = Engine(**(_settings(setup) | dict(setup.options)))
        self.with_loras = bool(setup.mode.loras)

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], out: int) -> list[list[int]]:
        outputs = self.engine.generate(
            input_ids=list(prompts),
            sampling_params={"temperature": 0.0, "max_new_tokens": out, "ignore_eos": True},
            lora_path=list(adapters) if self.with_loras else None,
        )
        return [list(output["output_ids"]) for output in outputs]

    def facts(self) -> dict[str, object]:
        import sglang  # noqa: PLC0415

        return {"version": sglang.__version__}

    def close(self) -> None:
        self.engine.shutdown()


def _settings(setup: Setup) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model_path": str(setup.pair / "target"), "skip_tokenizer_init": True, "dtype": setup.dtype,
        "context_length": setup.max_model_len, "max_running_requests": setup.max_num_seqs, "mem_fraction_static": 0.85,
        "disable_radix_cache": True, "attention_backend": "fa3", "random_seed": 0, "log_level": "error",
    }  # fmt: skip
    if setup.mode.loras:
        settings |= {
            "enable_lora": True, "lora_paths": {name: str(path) for name, path in setup.loras.items()},
            "max_loras_per_batch": setup.mode.loras, "max_lora_rank": 16, "lora_backend": "triton",
        }  # fmt: skip
    if setup.mode.speculates:
        if setup.mode.drafts is None:
            raise SystemExit("SGLang wants a number of drafts: use spec4, not specauto.")
        settings |= {
            "speculative_algorithm": "STANDALONE", "speculative_draft_model_path": str(setup.pair / "draft"),
            "speculative_num_steps": setup.mode.drafts, "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": setup.mode.drafts + 1,
        }  # fmt: skip
    return settings


def open_engine(setup: Setup) -> SglangEngine:
    return SglangEngine(setup)
