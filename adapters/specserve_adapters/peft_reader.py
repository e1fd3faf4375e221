"""PEFT LoRA folders → HostAdapter. The tensors are the truth; settings that disagree with them are an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from specserve.core.errors import AdapterError
from specserve_adapters.adapter_files import AdapterFiles, read_files
from specserve_adapters.host_adapter import HostAdapter, head_bytes, num_modules, unpack, write_places
from specserve_adapters.peft_config import PeftConfig, parse_config
from specserve_adapters.spec import LinearSpec, ModuleKey

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# A product of activations and larger values may overflow float32, and infinity times the weight 0 of a neighbour that
# does not use the adapter is NaN.
MAX_MAGNITUDE = 1e30
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_OUTER = "LoRA on embeddings and on lm_head is not supported; train it without them in target_modules"
_WHOLE = "whole embeddings are no LoRA; if they were not trained, save the adapter with save_embedding_layers=False"
_UNSUPPORTED_TENSORS = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding_", _OUTER),
    # Beside such a LoRA, PEFT saves the layer that it is on.
    ("embed_tokens.base_layer", _OUTER),
    ("lm_head.base_layer", _OUTER),
    ("embed_tokens.weight", _WHOLE),
    ("lm_head.weight", _WHOLE),
    ("lora_B.bias", "a bias on lora_B is not supported"),
    ("lora_B.default.bias", "a bias on lora_B is not supported"),
    ("modules_to_save", "fully trained modules are not supported"),
    ("trainable_tokens", "trained token embeddings are not supported"),
    (".bias", "trained biases are not supported"),
)
Modules = Mapping[str, tuple[ModuleKey, int, int]]  # full module name → key, in_features, out_features


def read_adapter(
    path: Path, specs: Sequence[LinearSpec], *, max_rank: int, dtype: torch.dtype, pin_memory: bool = False
) -> HostAdapter:
    """Read and validate the PEFT folder `path` for the model whose linears are `specs`.

    Raises AdapterError that names the file, setting or tensor. `dtype` is what the factors are converted to.
    """
    return parse_adapter(read_files(path), specs, max_rank=max_rank, dtype=dtype, pin_memory=pin_memory)


def parse_adapter(
    files: AdapterFiles, specs: Sequence[LinearSpec], *, max_rank: int, dtype: torch.dtype, pin_memory: bool = False
) -> HostAdapter:
    """As `read_adapter`, of files already in memory."""
    config = parse_config(files.config)
    modules = _modules(specs)
    tensors = _pair_tensors(_load_tensors(files.weights), modules)
    _check_targets(config, modules, tensors)
    for module, (a, b) in tensors.items():
        _, in_features, out_features = modules[module]
        rank = config.rank(module)
        if rank > max_rank:
            raise AdapterError(f"{module} has rank {rank}; the largest that is served here is {max_rank}.")
        _check_tensor(_tensor_name(module, "A"), a, (rank, in_features))
        _check_tensor(_tensor_name(module, "B"), b, (out_features, rank))
    return _pack(config, specs, tensors, dtype, pin_memory)


def _modules(specs: Iterable[LinearSpec]) -> Modules:
    modules: dict[str, tuple[ModuleKey, int, int]] = {}
    for spec in specs:
        for key, (name, out_features) in zip(spec.keys, spec.parts, strict=True):
            modules[f"model.layers.{spec.layer}.{name}"] = (key, spec.in_features, out_features)
    return modules


def _load_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_safetensors(data)
        return tensors
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise AdapterError(f"adapter_model.safetensors cannot be read: {error}.") from error


def _pair_tensors(tensors: Mapping[str, Tensor], modules: Modules) -> dict[str, tuple[Tensor, Tensor]]:
    """{full module name: (A, B)} in the model's order. Raises AdapterError for anything else in the file."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, tensor in sorted(tensors.items()):  # safetensors' order is random; the first fault is always the same
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            reason = next((why for part, why in _UNSUPPORTED_TENSORS if part in name), "it is not part of a LoRA")
            raise AdapterError(f"Tensor {name}: {reason}.")
        module, side = match["module"], match["side"]
        if module not in modules:
            outer = module.rpartition(".")[2] in ("embed_tokens", "lm_head")
            reason = _OUTER if outer else "the model has no such linear"
            raise AdapterError(f"Tensor {name}: {reason}.")
        if (module, side) in found:
            raise AdapterError(f"Tensor {name}: lora_{side} of {module} is there twice.")
        found[module, side] = tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module in modules:
        a, b = found.get((module, "A")), found.get((module, "B"))
        if a is not None and b is not None:
            pairs[module] = (a, b)
        elif a is not None or b is not None:
            missing, other = ("B", "A") if b is None else ("A", "B")
            raise AdapterError(f"Tensor {_tensor_name(module, missing)} is missing; its lora_{other} is there.")
    if not pairs:
        raise AdapterError("adapter_model.safetensors holds no LoRA tensors.")
    return pairs


def _check_targets(config: PeftConfig, modules: Modules, tensors: Mapping[str, object]) -> None:
    if config.target_modules is None:
        return
    for outer in ("model.embed_tokens", "lm_head"):
        if config.targets(outer):
            raise AdapterError(f"adapter_config.json: target_modules names {outer}, which cannot carry a LoRA here.")
    for module in modules:
        if config.targets(module) and module not in tensors:
            raise AdapterError(f"adapter_config.json targets {module}, but the weights hold no LoRA for it.")
        if module in tensors and not config.targets(module):
            raise AdapterError(f"The weights hold a LoRA for {module}, which adapter_config.json does not target.")


def _check_tensor(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tensor.dtype not in _FLOATS:
        raise AdapterError(f"Tensor {name} is {_short(tensor.dtype)}; float16, bfloat16, float32 or float64 expected.")
    if tuple(tensor.shape) != expected:
        raise AdapterError(f"Tensor {name} should have the shape {list(expected)}, but has {list(tensor.shape)}.")
    if not bool(tensor.isfinite().all()):
        raise AdapterError(f"Tensor {name} holds NaN or infinity.")
    if bool((tensor.abs() > MAX_MAGNITUDE).any()):
        raise AdapterError(f"Tensor {name} holds values beyond ±{MAX_MAGNITUDE:g}.")


def _pack(
    config: PeftConfig,
    specs: Sequence[LinearSpec],
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    pin_memory: bool,
) -> HostAdapter:
    modules, count = _modules(specs), num_modules(specs)
    size = sum(a.numel() + b.numel() for a, b in tensors.values()) * dtype.itemsize
    payload = torch.empty(head_bytes(count) + size, dtype=torch.uint8, pin_memory=pin_memory)
    blob = unpack(payload, count, dtype)[1]
    factors: dict[ModuleKey, tuple[Tensor, Tensor]] = {}
    offset = 0
    for module, (a, b) in tensors.items():
        a_view = blob[offset : offset + a.numel()].view(a.shape)
        b_view = blob[offset + a.numel() : offset + a.numel() + b.numel()].view(b.shape)
        offset += a.numel() + b.numel()
        a_view.copy_(a)
        b_view.copy_(b.double() * config.scaling(module))  # folded in float64: B is rounded once
        for side, view in (("A", a_view), ("B", b_view)):
            if not bool(view.isfinite().all()):
                raise AdapterError(f"Tensor {_tensor_name(module, side)} overflows {_short(dtype)}, alpha included.")
        factors[modules[module][0]] = (a_view, b_view)
    write_places(payload, specs, blob, factors)
    return HostAdapter(blob, factors, max(a.shape[0] for a, _ in factors.values()), payload)


def _tensor_name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
