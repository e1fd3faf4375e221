"""Triton kernels run on the GPU where there is one, else on the CPU through Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter's numbers are arrays of one element, which NumPy 2.4 no longer takes as the bounds of a loop.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_loop_bounds(tensor: Any, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_loop_bounds

    # It keeps bfloat16 as 16-bit integers and multiplies those.
    _dot = interpreter.InterpreterBuilder.create_dot

    def _widen(operand: Any) -> Any:
        if operand.dtype.scalar != interpreter.tl.bfloat16:
            return operand
        wide = (operand.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def _dot_of_wide(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _dot(builder, _widen(a), _widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = _dot_of_wide

    def _fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
        """The interpreter rounds the product, which fused is exact, as that of two float32 is in float64."""
        total = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fused


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    return torch.device("cpu")
