"""Build the corpus: read the packages' files, drop repeats, split by file, add chat examples."""

import ast
import hashlib
import json
import lzma
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import archives, chat
from .sources import ADAPTER_DOMAINS, PACKAGES, Package

SUFFIXES = {
    "python": (".py",),
    "english": (".rst", ".txt", ".md"),
    "docs": (".rst",),
    "javascript": (".js",),
    "css": (".css",),
    "sql": (".sql", ".py"),
}
UNWANTED = re.compile(
    r"\.min\.|[._/-]rtl|/umd/|/amd/|/locales?/|/i18n/|\.bundle\.|/vendored?/|/_vendor/|/node_modules/"
)
TESTS = re.compile(r"(^|/)(tests?|testing|benchmarks?)/|(^|/)test_|_test\.py|conftest")
_LOCALE_JS = re.compile(r"(^|/)locale[s]?[/.]")
_SQL_START = re.compile(r"\s*(SELECT|WITH|CREATE|INSERT|UPDATE|DELETE|MERGE|ALTER)\s")
PACKAGE_CAP = 2_500_000  # characters of one package in one domain, so that no package dominates
HELD_OUT_PERCENT = {"python": 2, "english": 4, "sql": 10, "css": 12}  # of the files; other domains: 5


@dataclass(frozen=True)
class Document:
    """One file, or one chat example made from it. `split` is train or held_out, decided by the file's name alone."""

    domain: str
    kind: str  # text | chat
    split: str
    source: str  # package==version
    path: str
    text: str
    reply: str = ""  # chat only: `text` is the user's message and `reply` the assistant's


def build(work: Path, tiny: bool) -> Path:
    """Write `corpus.jsonl.xz` under `work` and return its path. `tiny` reads the standard library alone, offline."""
    documents = list(_tiny_files() if tiny else _files(work / "packages"))
    kept = without_repeats(documents)
    path = work / "corpus.jsonl.xz"
    with lzma.open(path, "wt", preset=1, encoding="utf-8") as out:
        for document in [*kept, *_chats(kept)]:
            out.write(json.dumps(asdict(document)) + "\n")
    return path


def read(path: Path) -> Iterator[Document]:
    """Yield the documents that `build` wrote."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def _files(folder: Path) -> Iterator[Document]:
    yield from _capped("python", "python-stdlib", archives.standard_library())
    for package, archive in zip(PACKAGES, archives.fetch_all(PACKAGES, folder), strict=True):
        for domain in package.takes:
            wanted = ((path, data) for path, data in archives.members(archive, SUFFIXES[domain]))
            yield from _capped(domain, f"{package.name}=={package.version}", _filtered(package, domain, wanted))


def _tiny_files() -> Iterator[Document]:
    """Stand-ins for a test without a network: standard-library modules, dealt to the domains by name."""
    domains = ("python", "english", *ADAPTER_DOMAINS)
    for path, data in list(archives.standard_library())[::4]:
        if len(data) < 30_000:
            text = data.decode("utf-8", "replace")
            yield _document(domains[stable_hash(path) % len(domains)], "python-stdlib", path, text, percent=25)


def _filtered(package: Package, domain: str, files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    for path, data in files:
        is_test = bool(TESTS.search(path))
        unwanted = {
            "python": is_test,
            "docs": "examples/" not in path,
            "english": is_test or path.startswith("LICEN") or "/locale/" in path,
            # SQL files, and the SQL inside the SQL tools' own tests; TPC's benchmark queries have their own terms.
            "sql": "tpc" in path or (path.endswith(".py") and not is_test),
            "javascript": bool(_LOCALE_JS.search(path)),
        }.get(domain, False)
        if not unwanted and not UNWANTED.search(path):
            yield path, data


def _capped(domain: str, source: str, files: Iterator[tuple[str, bytes]]) -> Iterator[Document]:
    """Yield documents in an order that depends on their paths' hashes, until the package's share is used up."""
    total = 0
    for path, data in sorted(files, key=lambda file: stable_hash(file[0])):
        try:
            text = data.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if domain == "sql" and path.endswith(".py"):
            text = _sql_strings(text)
        if not readable(text) or total > PACKAGE_CAP:
            continue
        total += len(text)
        yield _document(domain, source, path, text)


def _document(domain: str, source: str, path: str, text: str, percent: int | None = None) -> Document:
    held_out = stable_hash(f"{source}/{path}") % 100 < (percent or HELD_OUT_PERCENT.get(domain, 5))
    return Document(domain, "text", "held_out" if held_out else "train", source, path, text)


def readable(text: str) -> bool:
    """Say whether a file looks written by people: not tiny, not huge, no tables or minified code."""
    if not 200 <= len(text) <= 300_000:
        return False
    digits = sum(map(str.isdigit, text)) / len(text)
    return len(text) / (text.count("\n") + 1) < 120 and digits < 0.15 and max(map(len, text.splitlines())) < 2_000


def _sql_strings(text: str) -> str:
    """Return the SQL statements among a Python file's string literals, one after the other."""
    try:
        nodes = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    except (SyntaxError, ValueError):
        return ""
    found = [value.strip().rstrip(";") for value in nodes if isinstance(value, str) and _SQL_START.match(value)]
    return "".join(f"{value};\n" for value in dict.fromkeys(found) if 30 <= len(value) <= 2_000)


def without_repeats(documents: list[Document]) -> list[Document]:
    """Drop files most of whose longer lines were seen in earlier files; held-out files come last and are judged harder.

    Packages ship the same code twice (bundles, copies): without this, held-out text would be training text.
    """
    seen: set[int] = set()
    kept = []
    for document in sorted(documents, key=lambda document: (document.split == "held_out", stable_hash(document.path))):
        lines = {stable_hash(line) for line in map(str.strip, document.text.splitlines()) if len(line) >= 24}
        limit = 0.4 if document.split == "held_out" else 0.6
        if len(lines & seen) <= limit * len(lines):
            kept.append(document)
        seen |= lines
    return kept


def _chats(documents: list[Document]) -> Iterator[Document]:
    """Yield chat examples, at most twelve a file; they stay in their file's split."""
    rng = random.Random(0)
    by_file = defaultdict(list)
    for document in documents:
        by_file[document] = list(chat.pairs(document.domain, document.text))
    for document, found in by_file.items():
        for task, answer in rng.sample(found, min(12, len(found))):
            fields = asdict(document) | {"kind": "chat", "text": chat.request(task, rng), "reply": answer}
            yield Document(**fields)


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
