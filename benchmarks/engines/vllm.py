"""vLLM's offline `LLM`, with the options that measured best for it (vLLM 0.26)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.engines import Setup

ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy needs none, and it compiles for minutes
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmEngine:
    """vLLM refuses nothing here; adapters act on the target alone when there is a draft model."""

    def __init__(self, setup: Setup) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams  # noqa: PLC0415
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        self.sampling = SamplingParams
        self.loras = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(setup.loras.items(), 1)
        }
        self.llm: Any = LLM(**(_settings(setup) | dict(setup.options)))

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], out: int) -> list[list[int]]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            self.sampling(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False),
            lora_request=[self.loras.get(name or "") for name in adapters] if self.loras else None,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def facts(self) -> dict[str, object]:
        import vllm  # noqa: PLC0415

        return {"version": vllm.__version__}

    def close(self) -> None:
        del self.llm


def _settings(setup: Setup) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": str(setup.pair / "target"), "skip_tokenizer_init": True, "dtype": setup.dtype,
        "max_model_len": setup.max_model_len, "max_num_seqs": setup.max_num_seqs, "gpu_memory_utilization": 0.85,
        "enable_prefix_caching": False, "seed": 0,  # without a draft model, asynchronous scheduling is on by itself
    }  # fmt: skip
    if setup.mode.loras:
        settings |= {
            "enable_lora": True, "max_loras": setup.mode.loras, "max_lora_rank": 16, "specialize_active_lora": True
        }  # fmt: skip
    if setup.mode.speculates:
        if setup.mode.drafts is None:
            raise SystemExit("vLLM wants a number of drafts: use spec4, not specauto.")
        settings["speculative_config"] = {
            "method": "draft_model", "model": str(setup.pair / "draft"), "num_speculative_tokens": setup.mode.drafts
        }  # fmt: skip
        settings["async_scheduling"] = True  # with one, only where it is asked for
    return settings


def open_engine(setup: Setup) -> VllmEngine:
    return VllmEngine(setup)
