"""Fetch the packages and read the text files out of their archives (or of the standard library)."""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .sources import Package


def fetch(package: Package, folder: Path) -> Path:
    """Download `package` into a folder of its own, unless it is there already; return the archive's path."""
    folder = folder / f"{package.registry}-{package.name.replace('/', '-')}-{package.version}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.iterdir())):
        if package.registry == "npm":
            command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        else:
            form = "--no-binary=:all:" if package.sdist else "--only-binary=:all:"
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", form, "--disable-pip-version-check"]
            command.append(f"{package.name}=={package.version}")
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found = sorted(folder.iterdir())
    return found[0]


def fetch_all(packages: tuple[Package, ...], folder: Path) -> list[Path]:
    """Download all packages, eight at a time: the wait is the registry's, not this machine's."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda package: fetch(package, folder), packages))


def members(archive: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the archive, content) of every file whose name ends with one of `suffixes`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(suffixes):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and member.name.endswith(suffixes):
                extracted = tar.extractfile(member)
                assert extracted is not None
                yield member.name.split("/", 1)[-1], extracted.read()


def standard_library() -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the Python standard library's modules, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped & set(relative.parts):
            yield str(relative), path.read_bytes()
