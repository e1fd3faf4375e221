"""adapter_config.json of a PEFT LoRA: what we honour, what changes nothing, and what we refuse by name.

A setting that we do not know and that is not switched off is refused too: it may change what the adapter computes,
and an adapter must never be served as something else than what was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from specserve.core.errors import AdapterError

_T = TypeVar("_T")
# Read by PeftConfig, or without meaning for the function that a trained plain LoRA computes.
_HONOURED = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
    | {"layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type"}
)
_HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
    | {"lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
    # Of initialisations (which init_lora_weights switches on) and of the backward pass alone.
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}
)
_UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "bias": "trained biases are not supported",
    "lora_bias": "a bias on lora_B is not supported",
    "modules_to_save": "fully trained modules are not supported",
    "fan_in_fan_out": "transposed base weights (Conv1D) are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "megatron_config": "Megatron adapters are not supported",
    "layer_replication": "replicated layers are not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
}
# Initialisations after which the base model stays as it was, so that the saved tensors are a plain LoRA on it.
# The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) train on a changed base; converted when saved, they say `true`.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


class PeftConfig(msgspec.Struct, frozen=True):
    """The honoured settings, with PEFT's defaults. Build it with `parse_config`."""

    peft_type: str = ""
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        """Rank of `module`, a full name such as "model.layers.0.self_attn.q_proj"."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What B @ A is multiplied with: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether the settings say that `module` (full name) carries a LoRA, by PEFT's own rules."""
        if self.target_modules is None or _listed(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module.rpartition(".")[2] not in ("embed_tokens", "lm_head")
            return re.fullmatch(self.target_modules, module) is not None
        return module in self.target_modules or (
            _listed(self.target_modules, module) and self._transforms_layer_of(module)
        )

    def _transforms_layer_of(self, module: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in patterns or [""]:
            found = _layer_regex(pattern).match(module)
            if found is not None:
                return int(found["layer"]) in (wanted if isinstance(wanted, list) else [wanted])
        return False


def parse_config(data: bytes) -> PeftConfig:
    """The settings of an adapter_config.json.

    Raises AdapterError that names the setting: malformed JSON, a wrong type or value, not a LoRA, or a setting
    that is not supported.
    """
    try:
        raw = msgspec.json.decode(data, type=dict[str, Any])
        config = msgspec.convert(raw, PeftConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(f"adapter_config.json cannot be read: {error}.") from error
    if config.peft_type != "LORA":
        raise AdapterError(f"adapter_config.json: peft_type is {config.peft_type!r}; only 'LORA' is supported.")
    _refuse_unsupported(raw)
    _check_init(config.init_lora_weights)
    _check_numbers(config)
    _check_patterns(config)
    return config


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for key, value in raw.items():
        if key in _HONOURED or key in _HARMLESS or not value or (key == "bias" and value == "none"):
            continue
        reason = _UNSUPPORTED.get(key, "this setting is not known")
        raise AdapterError(f"adapter_config.json: {key}={value!r}: {reason}.")


def _check_init(init: bool | str | None) -> None:
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterError(
            f"adapter_config.json: init_lora_weights={init!r} trains against a changed base model; save the adapter "
            "with path_initial_model_for_weight_conversion to turn it into a plain LoRA."
        )


def _check_numbers(config: PeftConfig) -> None:
    for name, rank in (("r", config.r), *(("rank_pattern", rank) for rank in (config.rank_pattern or {}).values())):
        if rank < 1:
            raise AdapterError(f"adapter_config.json: {name} must be at least 1, got {rank}.")
    alphas = (config.lora_alpha, *(config.alpha_pattern or {}).values())
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise AdapterError("adapter_config.json: lora_alpha and alpha_pattern must be finite.")


def _check_patterns(config: PeftConfig) -> None:
    whole = [("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)]
    layers = config.layers_pattern
    users: list[tuple[str, Iterable[str], Callable[[str], object]]] = [
        ("rank_pattern", config.rank_pattern or (), _suffix_regex),
        ("alpha_pattern", config.alpha_pattern or (), _suffix_regex),
        ("layers_pattern", (layers,) if isinstance(layers, str) else layers or (), _layer_regex),
        *((name, (value,), re.compile) for name, value in whole if isinstance(value, str)),
    ]
    for name, patterns, compiled in users:
        for pattern in patterns:
            try:
                compiled(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterError(
                    f"adapter_config.json: {name} holds {pattern!r}, which is no regular expression: {error}."
                ) from error


def _by_pattern(patterns: dict[str, _T] | None, module: str, default: _T) -> _T:
    """Value of the first pattern that matches the end of `module`, from a dot on (PEFT's rule)."""
    for pattern, value in (patterns or {}).items():
        if _suffix_regex(pattern).match(module):
            return value
    return default


def _suffix_regex(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _layer_regex(pattern: str) -> re.Pattern[str]:
    """The first index after a name that is `pattern`, or after any name where it is empty."""
    name = rf"(?:^|.*?\.){pattern}" if pattern else r".*?\.[^.]*"
    return re.compile(rf"{name}\.(?P<layer>\d+)\.")


def _listed(names: list[str] | str | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())
