"""Safetensors files → a model's parameters, a piece at a time; never a second copy of the whole, never pickle."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from specserve.core.errors import ModelLoadError
from specserve.layers.storage import Parameter
from specserve.loading.transfer import transfer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def fill(
    parameters: Mapping[str, Parameter],
    folder: Path,
    *,
    ignored: Collection[str] = (),
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Copy every tensor of the folder's checkpoint into its parameter, converting dtype and device.

    `ignored` tensors may be present; `advance` gets the bytes of the parameters as they are filled. Raises
    ModelLoadError naming a tensor that is missing, unexpected, of another shape or not floating point, or the file
    that cannot be read. All names are checked before anything is read.
    """
    files = checkpoint_files(folder)
    _check_names(parameters.keys(), {name for names in files.values() for name in names} - set(ignored))
    transfer((pair for path, names in files.items() for pair in _read(path, parameters, names)), advance)


def checkpoint_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a folder with the tensors to take from each, from the index or the one file."""
    index = folder / INDEX
    if index.is_file():
        return _indexed(index)
    path = folder / SINGLE
    if path.is_file():
        with _opened(path) as file:
            return {path: list(file.keys())}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise ModelLoadError(f"{folder} has no {SINGLE}, only pickled weights, which are never read; convert them.")
    raise ModelLoadError(f"{folder} has neither {SINGLE} nor {INDEX}.")


def _indexed(index: Path) -> dict[Path, list[str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = defaultdict(list)
        for name, file in weight_map.items():
            by_file[Path(file).name].append(name)  # files beside the index only
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not a safetensors index with a weight_map.") from error
    for file in by_file:
        if not (index.parent / file).is_file():
            raise ModelLoadError(f"{index} names {file}, which is missing.")
    return {index.parent / file: names for file, names in by_file.items()}


def _check_names(expected: Collection[str], found: Collection[str]) -> None:
    for what, names in (("lacks", set(expected) - set(found)), ("has unexpected", set(found) - set(expected))):
        if names:
            listed = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelLoadError(f"The checkpoint {what} {listed}{more}.")


def _read(
    path: Path, parameters: Mapping[str, Parameter], names: Collection[str]
) -> Iterator[tuple[Parameter, Tensor]]:
    """The file's tensors, checked, each with its parameter; their contents are read when they are copied."""
    with _opened(path) as file:
        for name in names:
            parameter = parameters.get(name)
            if parameter is None:
                continue  # ignored
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != parameter.shape:
                raise ModelLoadError(
                    f"Tensor {name} has shape {list(stored.get_shape())}; the config asks for {list(parameter.shape)}."
                )
            if stored.get_dtype() not in FLOATS:
                raise ModelLoadError(
                    f"Tensor {name} is {stored.get_dtype()}; supported are {', '.join(sorted(FLOATS))}."
                )
            yield parameter, file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, read where it lies; what cannot be read is the file's fault and names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read as safetensors: {error}") from error
