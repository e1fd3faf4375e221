"""Command-line flags made from the fields of the config structs, so that neither can forget the other."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

ENGINE_HELP = {
    "draft_model": "a smaller model with the same tokenizer, which drafts what the model then verifies",
    "num_draft_tokens": "tokens drafted a step; auto lets the engine choose",
    "speculation_method": "how drafts are verified; auto: coupled for requests with a seed, rejection for others",
    "proposer": "who drafts: draft_model, ngram, suffix, or two as suffix+draft_model; default: the draft model if any",
    "dtype": "of weights and cache; auto: the model's own",
    "quantization": "of the model's weights, done while loading: one byte each",
    "draft_quantization": "of the draft model's; auto: none on a GPU, int8 on a CPU where that measures faster",
    "device": "auto, cpu, cuda, cuda:1, …",
    "seed": "of requests without their own",
    "block_size": "tokens a page of the KV cache",
    "num_blocks": "pages of the KV cache; default: what memory allows",
    "kv_cache_bytes": "memory for the KV cache on a CPU",
    "gpu_memory_utilization": "share of a GPU's memory to use",
    "max_model_len": "context in tokens; default: the model's own",
    "max_num_seqs": "sequences in a batch",
    "max_num_batched_tokens": "tokens a step; default: 8192 on a GPU, 2048 on a CPU",
    "max_waiting": "sequences that may wait; more are refused with 429",
    "enable_prefix_caching": "reuse the KV of prompts' common beginnings",
    "pipeline_depth": "steps in flight; default: 2 on a GPU, 1 on a CPU",
    "enforce_eager": "run without CUDA graphs",
    "max_loras": "adapters on the device at a time; others wait in host memory",
    "max_lora_rank": "largest rank an adapter may have",
    "max_host_lora_bytes": "host memory for adapters; default: 4 GiB, or a quarter of the machine's where that is less",
    "max_adapters_per_request": "adapters that one request may sum",
}
SERVER_HELP = {
    "host": "address to listen on",
    "port": "port to listen on; 0: any free one",
    "api_key": "required of clients as a bearer token; better given as SPECSERVE_API_KEY",
    "served_model_name": "name of the base model in the API; may be repeated, the first one names answers",
    "adapter_root": "adapters may be loaded over HTTP from under this folder; may be repeated",
    "drain_timeout": "seconds that running requests get to finish on SIGTERM",
    "max_body_bytes": "largest request body",
}


_ANY_INTEGER = ("seed", "port", "max_waiting", "top_k", "random_prefix_len", "num_warmups")


def add_flags(parser: argparse._ActionsContainer, kind: type[msgspec.Struct], helps: Mapping[str, str]) -> None:
    """One flag for each field of `kind` that `helps` describes; a flag not given leaves the field's default."""
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        if field.name not in helps:
            continue
        default = "" if field.default in (None, (), msgspec.NODEFAULT) else f" [{field.default}]"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(helps[field.name] + default).replace("%", "%%"),
            **_argument(field.name, hints[field.name]),
        )


def from_flags(kind: type[T], args: argparse.Namespace, **more: Any) -> T:
    """A config struct from parsed flags; `more` sets or overrides fields."""
    given = {name: value for name, value in vars(args).items() if name in kind.__struct_fields__}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in (given | more).items()})


def _argument(name: str, hint: Any) -> dict[str, Any]:
    """argparse's settings for a field's type."""
    if name == "num_draft_tokens":
        return {"type": _auto_or_int, "metavar": "auto|N"}
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
        origin = get_origin(hint)
    if origin is Literal:
        return {"choices": list(get_args(hint))}
    if origin is tuple:
        return {"action": "append", "metavar": name.rsplit("_", maxsplit=1)[-1].upper()}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint is int and name not in _ANY_INTEGER:
        return {"type": _positive, "metavar": "N"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _auto_or_int(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number")
    return int(text)


def name_and_path(text: str) -> tuple[str, str]:
    """NAME=PATH of --lora."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path
