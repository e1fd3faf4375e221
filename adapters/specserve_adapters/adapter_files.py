"""The bytes of an adapter's folder, read once, and the content hash that names them."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from specserve.core.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_MAX_CONFIG_BYTES = 1 << 22
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """Both files of one PEFT folder as they were at one moment."""

    config: bytes
    weights: bytes


def check_folder(path: Path) -> None:
    """Raise AdapterError unless `path` is a folder with both files. Looks, but does not read."""
    try:
        if not path.is_dir():
            raise AdapterError(f"{path} is not a folder.")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            _size(path, name)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_files(path: Path, *, max_weight_bytes: int | None = None) -> AdapterFiles:
    """Read both files of the folder `path`, each once.

    Raises AdapterError: no such folder, a file missing (adapter_model.bin is a pickle and never read), unreadable, or
    larger than `max_weight_bytes`.
    """
    check_folder(path)
    try:
        _check_size(path, CONFIG_NAME, _MAX_CONFIG_BYTES)
        _check_size(path, WEIGHTS_NAME, max_weight_bytes)
        return AdapterFiles((path / CONFIG_NAME).read_bytes(), (path / WEIGHTS_NAME).read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error


def hash_files(target: AdapterFiles, draft: AdapterFiles | None) -> str:
    """Version of these contents: 128 bits, in hex, of both files of the target LoRA and of its companion, if any."""
    digest = hashlib.blake2b(digest_size=16)
    for files in (target, draft):
        for data in (files.config, files.weights) if files is not None else ():
            digest.update(len(data).to_bytes(8, "little"))  # so that no two sets of files run into the same bytes
            digest.update(data)
    return digest.hexdigest()


def hash_adapter(path: Path, draft_path: Path | None) -> str:
    """`hash_files` of the folders as they are now, streamed: for those who want the version and not the weights.

    Raises AdapterError where a folder cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in (path, draft_path):
        if folder is None:
            continue
        check_folder(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            _hash_file(digest, folder, name)
    return digest.hexdigest()


def _hash_file(digest: hashlib.blake2b, folder: Path, name: str) -> None:
    try:
        with (folder / name).open("rb") as file:
            size = left = _size(folder, name)
            digest.update(size.to_bytes(8, "little"))
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise _unreadable(folder, error) from error
    if left:
        raise AdapterError(f"{folder / name} changed while it was read; try again.")


def _size(path: Path, name: str) -> int:
    """Size in bytes of a regular file (a pipe, say, could block the reader for ever)."""
    try:
        status = (path / name).stat()
    except FileNotFoundError as error:
        hint = ""
        if name == WEIGHTS_NAME and (path / _PICKLE_NAME).exists():
            hint = f" ({_PICKLE_NAME} is a pickle and never read: save the adapter as safetensors)"
        raise AdapterError(f"{path} has no {name}{hint}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError(f"{path / name} is not a regular file.")
    return status.st_size


def _check_size(path: Path, name: str, limit: int | None) -> None:
    size = _size(path, name)
    if limit is not None and size > limit:
        raise AdapterError(f"{path / name} has {size} bytes; at most {limit} can be served here.")


def _unreadable(path: Path, error: OSError) -> AdapterError:
    return AdapterError(f"{error.filename or path} cannot be read: {error.strerror or error}.")
