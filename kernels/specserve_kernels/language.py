"""Triton where it is installed (Linux); elsewhere a stand-in, so that kernels and references share a file everywhere.

from specserve_kernels.language import tl, triton

Triton's own `cdiv` and `next_power_of_2` take the host microseconds; `cdiv` and `power_of_2` are for it.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Takes every decoration and attribute; a kernel made from it cannot be launched."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Triton is not installed: pip install triton.")

    triton = tl = _Absent()


def cdiv(number: int, by: int) -> int:
    """number / by, rounded up."""
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below `number` ≥ 1."""
    return 1 << (number - 1).bit_length()


__all__ = ["cdiv", "power_of_2", "tl", "triton"]
