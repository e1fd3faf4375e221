"""What is compared: servers told by flags of `specserve serve`, by a command, or by the URL of one that runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from specserve.bench.engines import check_installed, engine_of, model_of
from specserve.config import DEMO_ROOT
from specserve.core.errors import InvalidRequestError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")


class Variant(msgspec.Struct, frozen=True, omit_defaults=True):
    """One side of a comparison: either a command, whose port and memory share are filled in later, or a URL."""

    name: str
    title: str
    engine: str = "unknown"
    command: tuple[str, ...] = ()
    url: str | None = None
    environment: dict[str, str] = {}
    model: str | None = None  # its name in the API, where the server's list of models does not begin with it
    tokenizer: str | None = None  # folder or hub id of what it serves, as far as it says


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: str
    title: str | None = None
    environment: dict[str, str] = {}
    model: str | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    variants: dict[str, str | _Entry]
    model: str | None = None


def parse_variant(name: str, text: str, model: str) -> Variant:
    """A variant of `http://…`, of a server's command (`vllm serve …`) or of flags of `specserve serve`.

    `model` is what flags alone serve. Raises InvalidRequestError naming the variant.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(f"The variant name {name!r} must be 1 to 40 of the characters A-Z a-z 0-9 . _ -")
    if text.startswith(("http://", "https://")):
        return Variant(name, text, url=text.rstrip("/"))
    words = _words(name, text)
    if any(word.split("=")[0] == "--api-key" for word in words):
        raise InvalidRequestError(
            f"--{name}: reports show a side's command, so leave --api-key out of it and set SPECSERVE_API_KEY (for "
            "another server its own variable, and --api-key of this command).",
            param="api_key",
        )
    if not words or words[0].startswith("-"):
        return Variant(name, _title(words), "specserve", _serve([model, *words]), tokenizer=model)
    if words[0] == "specserve" and words[1:2] == ["serve"]:
        own = words[2:] if words[2:] and not words[2].startswith("-") else [model, *words[2:]]
        return Variant(name, _title(words), "specserve", _serve(own), tokenizer=own[0])
    engine = engine_of(words)
    if engine is None and not any("{port}" in word for word in words):
        raise InvalidRequestError(
            f"--{name} {text!r} is neither flags of `specserve serve`, nor a URL, nor a server that is known: write "
            "another server's port as {port}, say `./serve --port {port}`."
        )
    check_installed(words)
    served = model_of(words)
    # `transformers serve` lists all models that are on the machine.
    only = served if engine is not None and engine.name == "transformers" else None
    kind = engine.name if engine else "unknown"
    return Variant(name, _title(words), kind, tuple(words), model=only, tokenizer=served)


def read_variants(path: str, model: str) -> list[Variant]:
    """The variants of a YAML file: `variants: {NAME: TEXT or {run: TEXT, title, environment, model}}`, and the
    `model` of those that are flags alone.

    Raises InvalidRequestError naming what is wrong where.
    """
    import yaml  # noqa: PLC0415  only for such files

    try:
        found = msgspec.convert(yaml.safe_load(Path(path).read_text(encoding="utf-8")), _File)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InvalidRequestError(f"{path}: {reason}") from error
    check_count(found.variants)
    served = found.model or model
    entries = {name: _Entry(value) if isinstance(value, str) else value for name, value in found.variants.items()}
    return [_of_entry(name, entry, served) for name, entry in entries.items()]


def _of_entry(name: str, entry: _Entry, served: str) -> Variant:
    found = parse_variant(name, entry.run, served)
    return msgspec.structs.replace(
        found, title=entry.title or found.title, environment=entry.environment, model=entry.model or found.model
    )


def check_count(variants: Sequence[object] | Mapping[str, object]) -> None:
    if len(variants) < 2:
        raise InvalidRequestError(f"A comparison takes two variants at least, not {len(variants)}.")


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidRequestError(f"--{name} {text!r}: {error}.") from error


def _serve(words: Sequence[str]) -> tuple[str, ...]:
    """`specserve serve` on a model. The demo's parts are named one by one, for `demo` alone brings its draft model
    along, and then no variant could be without."""
    model, *flags = words
    # Only the word after --draft-model may mean the bundled draft.
    for place, word in enumerate(flags):
        if word == "--draft-model" and flags[place + 1 : place + 2] == ["demo"]:
            flags[place + 1] = str(DEMO_ROOT / "draft")
        elif word == "--draft-model=demo":
            flags[place] = f"--draft-model={DEMO_ROOT / 'draft'}"
    if model != "demo":
        return ("specserve", "serve", model, *flags)
    named = [] if any(word.startswith("--served-model-name") for word in flags) else ["--served-model-name", "demo"]
    loras = [] if any(word.startswith("--lora") for word in flags) else _demo_loras()
    return ("specserve", "serve", str(DEMO_ROOT / "target"), *named, *loras, *flags)


def _demo_loras() -> list[str]:
    folders = sorted(path for path in (DEMO_ROOT / "adapters").iterdir() if path.is_dir())
    return [word for path in folders for word in ("--lora", f"{path.name}={path}")]


def _title(words: Sequence[str]) -> str:
    """Short: flags as they were given, folders by their last part."""
    return " ".join(word if len(word) < 40 else Path(word).name for word in words) or "no flags"
