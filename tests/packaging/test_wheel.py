"""The built wheel holds everything, and lives beside PyPI's `kernels` without being mistaken for it."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[2]
SOURCES = {
    "specserve": ROOT / "specserve",
    "specserve_kernels": ROOT / "kernels/specserve_kernels",
    "specserve_adapters": ROOT / "adapters/specserve_adapters",
}

# transformers uses what it finds under this name as soon as the version suits, so a stand-in of that version shows
# whether it found the distribution or a folder of ours. Every name is there: those it wants change with each release.
STAND_IN = """
origin = "PyPI"
def _decorator(*args, **kwargs):
    return lambda target: target
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _decorator if name.islower() else type(name, (), {"TRAINING": 1, "INFERENCE": 2})
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # importing specserve never needs it
import kernels, specserve, specserve_kernels, specserve_adapters
import transformers.modeling_utils, transformers.models.llama.modeling_llama
for package in (specserve, specserve_kernels, specserve_adapters):
    assert package.__file__.startswith(sys.prefix), package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(getattr(kernels, "origin", kernels.__file__), "adapters" in sys.modules, len(sys.modules))
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that the tree keeps no build products and none of its own slip into the wheel."""
    tree = tmp_path_factory.mktemp("source")
    for folder in ("specserve", "kernels", "adapters"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True)
    return next((tree / "dist").glob("specserve-*.whl"))


@pytest.fixture
def clean_venv(wheel: Path, tmp_path: Path) -> Path:
    """A new environment with the wheel alone; torch and the others are borrowed from the running one, behind it."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    (_site_packages(python) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _site_packages(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python*/site-packages"))


def _import_everything(python: Path) -> list[str]:
    # The wheel's environment must not see this checkout: neither its folder nor an inherited path.
    run = subprocess.run(
        [python, "-c", IMPORT_EVERYTHING],
        check=False,
        cwd=python.parent,
        env={"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1].split()


def test_wheel_holds_every_source_and_demo_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in SOURCES.items():
        wanted = {
            f"{package}/{path.relative_to(folder)}"
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert wanted <= held, f"missing from the wheel: {sorted(wanted - held)}"
    tops = {name.split("/")[0] for name in held}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(SOURCES)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert any(name.startswith("specserve/demo/") and name.endswith(".safetensors") for name in held)


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join((package, *init.parent.relative_to(folder).parts))
        for package, folder in SOURCES.items()
        for init in folder.rglob("__init__.py")
    }
    assert set(listed) == found


def test_wheel_beside_a_package_named_kernels(clean_venv: Path) -> None:
    site = _site_packages(clean_venv)
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text(STAND_IN)
    metadata = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    origin, adapters_imported, _ = _import_everything(clean_venv)
    assert (origin, adapters_imported) == ("PyPI", "False")


@pytest.mark.slow  # downloads it
def test_wheel_beside_the_real_kernels(clean_venv: Path) -> None:
    install = [sys.executable, "-m", "pip", "--python", str(clean_venv), "install", "--quiet", "kernels"]
    subprocess.run(install, check=True)
    origin, adapters_imported, _ = _import_everything(clean_venv)
    assert origin.startswith(str(_site_packages(clean_venv)))
    assert adapters_imported == "False"


def test_console_script_is_there(clean_venv: Path) -> None:
    run = subprocess.run(
        [clean_venv.parent / "specserve", "--help"], cwd=clean_venv.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "serve" in run.stdout


@pytest.mark.parametrize("package", SOURCES)
def test_nothing_of_ours_imports_kernels_or_adapters(package: str) -> None:
    for path in SOURCES[package].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"kernels", "adapters"}, f"{path} imports {tops}"


@pytest.mark.parametrize("folder", ["kernels", "adapters", "tests", "benchmarks", "examples"])
def test_top_level_folders_are_not_packages(folder: str) -> None:
    assert not list((ROOT / folder).glob("__init__.py"))
    assert not (ROOT / "tests" / folder / "__init__.py").exists()
