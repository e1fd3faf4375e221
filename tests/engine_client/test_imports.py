"""The API process needs no torch of ours, and so holds no CUDA context."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ["specserve.engine.client.async_engine", "specserve.server.serve", "specserve.cli.main"]


@pytest.mark.parametrize("module", MODULES)
def test_our_modules_import_no_torch(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
