"""Files of JSON lines, as users hand them in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from specserve.core.errors import InvalidRequestError

T = TypeVar("T")


def read_file(path: str | Path, param: str) -> bytes:
    """Its content; raises InvalidRequestError for the option `param`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.", param=param) from error


def read_lines(path: str | Path, kind: type[T], param: str) -> Iterator[tuple[str, T]]:
    """(where, value) of each line that is not blank; raises InvalidRequestError naming the line that is no `kind`."""
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(read_file(path, param).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, decoder.decode(line)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"{where}: {error}", param=param) from error
