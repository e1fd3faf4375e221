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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    return torch.device("cpu")
