"""The reference for the twin: transformers' Llama in float32, without a cache, adapters added explicitly.

Nothing of specserve is used here: the adapters' files are read and applied by the few lines below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

TOKENS_PER_FORWARD = 16384
ROWS_PER_HEAD = 1024  # logits are kept for so many positions at once: 0.5 GB of float32 at 128k tokens
Lora = Mapping[str, tuple[Tensor, Tensor, float]]
"""Module's name → (A [rank, in], B [out, rank], scale)."""


def read_lora(folder: Path, device: str) -> Lora:
    """A PEFT folder's LoRA in float32; y += scale · B(A x), scale = alpha / r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    modules = [name.removeprefix(prefix).removesuffix(suffix) for name in tensors if name.endswith(suffix)]

    def factor(module: str, which: str) -> Tensor:
        tensor: Tensor = tensors[f"{prefix}{module}.lora_{which}.weight"]
        return tensor.to(device, torch.float32)

    scale = config["lora_alpha"] / config["r"]
    return {module: (factor(module, "A"), factor(module, "B"), scale) for module in modules}


def round_linears(model: nn.Module, quantization: str) -> None:
    """Give linears, the head among them, the weights that one byte each stands for: multiples of a scale a row, or e4m3
    floats times it; scales are bfloat16 numbers. What is shared with the embedding is not rounded there."""
    largest = {"int8": 127.0, "fp8": 448.0}[quantization]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().float()
            scale = (weight.abs().amax(1, keepdim=True) / largest).bfloat16().float()
            codes = weight / scale
            codes = codes.round() if quantization == "int8" else codes.to(torch.float8_e4m3fn).float()
            module.weight = nn.Parameter((codes.clamp(-largest, largest) * scale).to(module.weight.dtype))


class Reference:
    """One model, its weights rounded if they are quantised where they are compared; `loras[name]` are the adapters that
    sequences may name."""

    def __init__(self, folder: Path, loras: Mapping[str, Path], device: str, quantization: str = "none") -> None:
        self.device = device
        # Converted on the device: widening is exact, and much faster there.
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
        self.model: Any = model.to(device).float().eval()
        if quantization != "none":
            round_linears(self.model, quantization)
        self.loras = {name: read_lora(path, device) for name, path in loras.items()}
        self._rows: dict[str, list[int]] = {}  # adapter → its rows of the forward under way
        for name, module in self.model.named_modules():
            if any(name in lora for lora in self.loras.values()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, module: str) -> Any:
        def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for name, rows in self._rows.items():
                if module in self.loras[name]:
                    a, b, scale = self.loras[name][module]
                    output[rows] += scale * (inputs[0][rows] @ a.T) @ b.T
            return output

        return add

    @torch.inference_mode()
    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        starts: Sequence[int],
        tokens: Sequence[Tensor],
    ) -> list[Tensor]:
        """log p(tokens[i][j] | sequences[i][: starts[i] + j]) for tokens[i] [n_i, N]: [n_i, N] float32 on the CPU."""
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        for part in _parts([len(sequence) for sequence in sequences]):
            hidden = self._hidden([sequences[i] for i in part], [adapters[i] for i in part])
            wanted = [hidden[k, starts[i] - 1 :][: len(tokens[i])] for k, i in enumerate(part)]
            ids = torch.cat([tokens[i] for i in part]).to(self.device)
            found = torch.split(self._of_tokens(torch.cat(wanted), ids), [len(tokens[i]) for i in part])
            for i, values in zip(part, found, strict=True):
                results[i] = values
        return results

    def _hidden(self, sequences: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> Tensor:
        """Final hidden states [B, longest, hidden]; attention is causal, so padding behind a sequence changes none."""
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        names = {name for name in adapters if name is not None}
        self._rows = {name: [row for row, own in enumerate(adapters) if own == name] for name in sorted(names)}
        hidden: Tensor = self.model.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return hidden

    def _of_tokens(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log_softmax(head(hidden)) [n, V] at tokens [n, N]."""
        found = []
        for states, ids in zip(torch.split(hidden, ROWS_PER_HEAD), torch.split(tokens, ROWS_PER_HEAD), strict=True):
            logits = self.model.lm_head(states)
            found.append((logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)).cpu())
        return torch.cat(found)


def _parts(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of like lengths, each padded to at most TOKENS_PER_FORWARD tokens."""
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or lengths[parts[-1][0]] * (len(parts[-1]) + 1) > TOKENS_PER_FORWARD:
            parts.append([])
        parts[-1].append(index)
    return parts
