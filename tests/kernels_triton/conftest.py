"""Triton kernels run on the GPU where there is one, else on the CPU through Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    return torch.device("cpu")
