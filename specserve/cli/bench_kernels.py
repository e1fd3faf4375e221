"""`specserve bench kernels`: the repository's benchmark of kernels, which the installed package does not hold."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import specserve
from specserve.cli.exits import EXIT_REFUSED


def add_kernels(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "each kernel's time on this device against its floor (in a checkout of the repository)"
    parser = actions.add_parser("kernels", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--only", metavar="OP,…", help="these kernels alone")
    parser.add_argument("--results", metavar="FILE", help="add the figures to this file of JSON lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, root: Path | None = None) -> int:
    """Run the benchmark of the checkout that this package comes from; its exit status, or 2 without a checkout."""
    root = root or Path(specserve.__file__).parents[1]
    if not (root / "benchmarks" / "ops").is_dir():
        print(
            "specserve: the benchmark of kernels is not part of the installed package: run this command, or "
            "`make bench-kernels`, in a checkout of the repository.",
            file=sys.stderr,
        )
        return EXIT_REFUSED
    command = [sys.executable, "-P", "-m", "benchmarks.ops"]
    command += [word for name in ("only", "results") if (value := getattr(args, name)) for word in (f"--{name}", value)]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode
