"""Text that every machine with this project has: the standard library and the installed packages, by domain.

The base model reads Python and some English; each other domain is an adapter's. Which packages are installed differs
between machines, so figures of different machines compare only with the same corpus (`--corpus`).
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from demo_training.corpus import TESTS, UNWANTED, Document, readable, stable_hash, without_repeats

BASE_DOMAINS = ("python", "english")
# Characters of a domain, and of one package in it: enough for some minutes of training, and no package dominates.
MOST = {"python": 60e6, "english": 4e6, "cpp": 15e6, "stubs": 6e6, "tests": 15e6, "docstrings": 6e6}
MOST_OF_A_PACKAGE = 0.25
LEAST = 300_000  # a domain with less is left out
HELD_OUT_PERCENT = 6
# One of so many files gives its docstrings to their domain, and not its code to the base's.
DOCSTRINGS_OF = 4
SUFFIXES = {
    ".h": "cpp", ".hpp": "cpp", ".cuh": "cpp", ".cu": "cpp", ".cpp": "cpp", ".pyi": "stubs", ".py": "python",
    ".md": "english", ".rst": "english", ".txt": "english", "METADATA": "english",
}  # fmt: skip


_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.{80,}?)"""', re.M | re.S)
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}  # the former are roots of their own


def installed_text(scale: float = 1.0) -> list[Document]:
    """The documents of all domains with enough text; `scale` is applied to how much is read of each."""
    totals: Counter[tuple[str, str]] = Counter()
    documents: list[Document] = []
    for package, name, path in sorted(_files(), key=lambda found: stable_hash(found[1])):
        domain = _domain(name)
        room = MOST[domain] * scale
        if totals[domain, ""] >= room or totals[domain, package] >= MOST_OF_A_PACKAGE * room:
            continue
        text = _text(domain, path)
        if not readable(text):
            continue
        totals.update({(domain, ""): len(text), (domain, package): len(text)})
        # Hashed again with a word before it: the order of reading must not decide what is held out.
        held_out = stable_hash(f"split {name}") % 100 < HELD_OUT_PERCENT
        documents.append(Document(domain, "text", "held_out" if held_out else "train", package, name, text))
    kept = without_repeats(documents)
    characters: Counter[str] = Counter()
    for document in kept:
        characters[document.domain] += len(document.text)
    return [document for document in kept if characters[document.domain] >= LEAST * scale]


def _files() -> Iterator[tuple[str, str, Path]]:
    """(package, path inside the root, path) of every file of a known kind."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(paths[key] for key in ("stdlib", "purelib", "platlib")):
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED]
            inside = os.path.relpath(folder, root)
            for file in files:
                name = file if inside == "." else f"{inside}/{file}"
                if _kind(file) is not None and not UNWANTED.search(name):
                    yield name.split("/", 1)[0], name, Path(folder, file)


def _kind(file: str) -> str | None:
    return SUFFIXES.get(file if file == "METADATA" else os.path.splitext(file)[1])


def _domain(name: str) -> str:
    domain = _kind(os.path.basename(name))
    assert domain is not None
    if domain != "python":
        return domain
    if TESTS.search(name):
        return "tests"
    return "docstrings" if stable_hash(f"docstrings {name}") % DOCSTRINGS_OF == 0 else "python"


def _text(domain: str, path: Path) -> str:
    try:
        text = path.read_text("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""
    return _docstrings(text) if domain == "docstrings" else text


def _docstrings(text: str) -> str:
    """The file's longer strings in three quotes that begin a line: nearly all are docstrings."""
    return "\n\n".join(inspect.cleandoc(found) for found in _DOCSTRING.findall(text)) + "\n"
