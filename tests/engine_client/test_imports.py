"""The API process needs no torch of ours, and so holds no CUDA context."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ["specserve.engine.client.async_engine", "specserve.server.serve", "specserve.cli.serve"]


@pytest.mark.parametrize("module", MODULES)
def test_our_modules_import_no_torch(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "others"),
    [
        ("serve", ["specserve.bench", "specserve.cli.adapters", "numpy"]),
        ("--help", ["specserve.bench", "specserve.server", "aiohttp"]),
    ],
)
def test_a_command_imports_nothing_of_the_others(command: str, others: list[str]) -> None:
    program = (
        "import sys\n"
        "from specserve.cli.main import make_parser\n"
        f"make_parser({command!r})\n"
        f"print([name for name in {others!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_no_cuda_context_even_where_the_tokenizer_brings_torch(tiny: Path) -> None:
    program = (
        "import sys\n"
        "from specserve.engine.client.tokenizer import Tokenizer\n"
        f"Tokenizer.load({str(tiny / 'model')!r}).encode('the')\n"
        "print('torch' in sys.modules and sys.modules['torch'].cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_tokenizer_works_where_torch_is_missing(tiny: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from specserve.engine.client.tokenizer import Tokenizer\n"
        f"tokenizer = Tokenizer.load({str(tiny / 'model')!r})\n"
        "print(tokenizer.decode(tokenizer.encode('the quick brown fox')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the quick brown fox"
