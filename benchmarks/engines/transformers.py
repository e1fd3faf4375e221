"""transformers' `generate` over a static batch; adapters through PEFT's mixed batches, no draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peft import PeftModel

from benchmarks.engines import Setup


class TransformersEngine:
    """A model with scaled-dot-product attention in the pair's dtype."""

    def __init__(self, setup: Setup) -> None:
        if setup.mode.speculates:
            raise SystemExit("generate drafts for single sequences only; measure it with spec0.")
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            setup.pair / "target", dtype=setup.dtype, attn_implementation="sdpa"
        )
        self.model = self.model.to(setup.device).eval()
        self.with_loras = bool(setup.mode.loras)
        for name, path in setup.loras.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(path), adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, str(path), adapter_name=name)
        self.device = setup.device

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], out: int) -> list[list[int]]:
        ids = torch.tensor(list(prompts), device=self.device)
        extra = {"adapter_names": [name or "__base__" for name in adapters]} if self.with_loras else {}
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=out, min_new_tokens=out,
            do_sample=False, eos_token_id=None, pad_token_id=0, **extra,
        )  # fmt: skip
        tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return tokens

    def facts(self) -> dict[str, object]:
        return {"version": transformers.__version__}

    def close(self) -> None:
        del self.model


def open_engine(setup: Setup) -> TransformersEngine:
    return TransformersEngine(setup)
