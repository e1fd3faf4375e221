"""The files of an adapter's folder: read in pieces by several threads at once, and the content hash that names them.

A version is the SHA-256 of what was read, in a tree: each piece of the weights has its own, so that threads share the
work, and each is taken of the very bytes in memory that are parsed afterwards.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specserve.core.errors import AdapterError
from specserve_adapters.helpers import Helpers, in_parallel
from specserve_adapters.safetensors_file import PREFIX_BYTES, header_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PIECE_BYTES = 4 << 20  # of a version's definition: another number gives other versions
_PICKLE_NAME = "adapter_model.bin"
_MAX_CONFIG_BYTES = 1 << 22


def check_folder(path: Path) -> None:
    """Raise AdapterError unless `path` is a folder with both files. Looks, but does not read."""
    try:
        if not path.is_dir():
            raise AdapterError(f"{path} is not a folder.")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            _size(path, name)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_config(path: Path) -> bytes:
    """The bytes of the folder's adapter_config.json. Raises AdapterError."""
    check_folder(path)
    try:
        size = _size(path, CONFIG_NAME)
        if size > _MAX_CONFIG_BYTES:
            raise AdapterError(f"{path / CONFIG_NAME} has {size} bytes; at most {_MAX_CONFIG_BYTES} can be served.")
        return (path / CONFIG_NAME).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


class WeightsFile:
    """An open adapter_model.safetensors: `header` has been read, `data_bytes` come behind it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.num_bytes = os.fstat(descriptor).st_size
        prefix = self._read_some(0, min(PREFIX_BYTES, self.num_bytes))
        self.header = self._read_some(0, header_bytes(prefix, self.num_bytes))
        self.data_bytes = self.num_bytes - len(self.header)

    def read_data(self, data: Tensor, helpers: Helpers, look: Callable[[Tensor], bool]) -> tuple[list[bytes], bool]:
        """Fill `data` [data_bytes] uint8: the pieces' hashes, and whether `look` said yes to all of them.

        Each piece is hashed and looked at while it is warm in a cache. Pieces begin at multiples of PIECE_BYTES.
        """

        def work(first: int) -> tuple[bytes, bool]:
            piece = data[first : first + PIECE_BYTES]
            self._read_into(_view(piece), len(self.header) + first)
            return hashlib.sha256(_view(piece)).digest(), look(piece)

        done = in_parallel(helpers, work, range(0, self.data_bytes, PIECE_BYTES))
        return [digest for digest, _ in done], all(looks for _, looks in done)

    def hash_data(self) -> list[bytes]:
        """The pieces' hashes, for those who do not want the data."""
        piece = torch.empty(min(PIECE_BYTES, self.data_bytes), dtype=torch.uint8)
        hashes: list[bytes] = []
        for first in range(0, self.data_bytes, PIECE_BYTES):
            view = _view(piece[: self.data_bytes - first])
            self._read_into(view, len(self.header) + first)
            hashes.append(hashlib.sha256(view).digest())
        return hashes

    def _read_some(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._read_into(memoryview(data), offset)
        return bytes(data)

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise AdapterError(f"{self._path} changed while it was read; try again.")
            done += count


def _view(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


@contextmanager
def open_weights(path: Path, *, max_bytes: int | None = None) -> Iterator[WeightsFile]:
    """The weights of the folder `path`, checked to be no larger than `max_bytes`. Raises AdapterError, also for what
    goes wrong with the file inside."""
    try:
        size = _size(path, WEIGHTS_NAME)
        if max_bytes is not None and size > max_bytes:
            raise AdapterError(
                f"{path / WEIGHTS_NAME} has {size} bytes; at most {max_bytes} can be served here: "
                "start with a larger --max-host-lora-bytes."
            )
        descriptor = os.open(path / WEIGHTS_NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield WeightsFile(path / WEIGHTS_NAME, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error


def hash_folder(config: bytes, header: bytes, pieces: Sequence[bytes]) -> bytes:
    """What one folder's contents add to a version: both files, the weights as header and hashes of pieces."""
    digest = hashlib.sha256()
    for part in (config, header, b"".join(pieces)):
        digest.update(len(part).to_bytes(8, "little"))  # so that no two sets of files run into the same bytes
        digest.update(part)
    return digest.digest()


def version_of(target: bytes, draft: bytes | None) -> str:
    """Version of these contents (`hash_folder`): 128 bits, in hex."""
    return hashlib.sha256(target + (draft or b"")).hexdigest()[:32]


def hash_adapter(path: Path, draft_path: Path | None) -> str:
    """The version of the folders as they are now, for those who want it and not the weights.

    Raises AdapterError where a folder cannot be read.
    """
    return version_of(_hash_of(path), None if draft_path is None else _hash_of(draft_path))


def _hash_of(path: Path) -> bytes:
    config = read_config(path)
    with open_weights(path) as weights:
        return hash_folder(config, weights.header, weights.hash_data())


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


def _unreadable(path: Path, error: OSError) -> AdapterError:
    return AdapterError(f"{error.filename or path} cannot be read: {error.strerror or error}.")
