"""Kernels that are launched again and again: what Triton works out about a launch is worked out once.

A forward that is not a captured graph launches hundreds of kernels, and Triton takes tens of microseconds of the host
for each: it binds the arguments, asks the environment for its settings, describes every argument, and asks the driver
about every pointer. `@relaunched` above `@triton.jit` keeps the compiled kernel by what decides which one it is: dtype
and alignment of each tensor, whether a number is 1, a multiple of 16 or wider than 32 bits, and the constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from triton.runtime.jit import JITFunction
except ImportError:  # nothing to launch then

    class JITFunction:  # type: ignore[no-redef]
        """Nothing is one."""


class Relaunched:
    """A kernel, used as Triton's own is: `kernel[grid](*arguments, **constants)`.

    The kernel's constants come behind its other arguments and are named in every call, so are its options.
    """

    def __init__(self, kernel: Any) -> None:
        self.fn = kernel
        self._fillers = (None,) * sum(parameter.is_constexpr for parameter in kernel.params)
        self._launchers: dict[Any, tuple[Any, Any, Any]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        device = torch._C._cuda_getDevice()
        traits: list[Any] = [device, *constants, *constants.values()]
        values = [_describe(argument, traits) for argument in arguments]
        key = tuple(traits)
        found = self._launchers.get(key)
        if found is None:
            compiled = self.fn[grid](*arguments, **constants)
            self._launchers[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream, function, metadata, None, None, None, *values, *self._fillers)


def _describe(argument: Any, traits: list[Any]) -> Any:
    """Add to `traits` what Triton would compile another kernel for; return what its launcher takes fastest."""
    kind = type(argument)
    if kind is Tensor:
        pointer = argument.data_ptr()
        traits += (argument.dtype, pointer % 16 == 0)
        return pointer
    if kind is int:
        wide = not -(2**31) <= argument < 2**31
        traits += (wide, argument == 1, argument % 16 == 0)
    elif argument is None or kind is bool or kind is float:
        traits.append(kind)
    else:  # a descriptor of tiles: its layout is part of the kernel
        traits += (argument.base.dtype, tuple(argument.block_shape), argument.layout, argument.padding)
    return argument


def relaunched(kernel: Any) -> Any:
    """Decorates a kernel that is launched from Python. Triton's interpreter runs what it is given as it is."""
    return Relaunched(kernel) if isinstance(kernel, JITFunction) else kernel
