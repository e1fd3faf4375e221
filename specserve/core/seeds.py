"""Seeds of samples: n answers to one prompt each get their own, derived from the request's."""

from __future__ import annotations

import hashlib
import struct


def derive_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request: its own seed for the first, a hash of both (63 bits) for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<qI", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
