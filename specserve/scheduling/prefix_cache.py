"""Hash chains over full blocks. Two requests share a block only if everything that its KV depends on is equal."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

DIGEST_BYTES = 16


def root_hash(adapters: Sequence[tuple[str, float]], cache_salt: str = "", extra: Sequence[str] = ()) -> bytes:
    """128-bit root of a chain: canonical (adapter version, fp32 scale) list, cache salt and extra keys.

    Every field is length-prefixed, so no two different inputs concatenate to the same bytes.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for version, scale in adapters:
        raw = version.encode()
        digest.update(b"a" + struct.pack("<If", len(raw), scale) + raw)
    for text in (cache_salt, *extra):
        raw = text.encode()
        digest.update(b"s" + struct.pack("<I", len(raw)) + raw)
    return digest.digest()


def extend_hashes(hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append to `hashes` the hash of every full block of `token_ids` that it lacks."""
    while (len(hashes) + 1) * block_size <= len(token_ids):
        start = len(hashes) * block_size
        parent = hashes[-1] if hashes else root
        block = struct.pack(f"<{block_size}I", *token_ids[start : start + block_size])
        hashes.append(hashlib.blake2b(parent + block, digest_size=DIGEST_BYTES).digest())
