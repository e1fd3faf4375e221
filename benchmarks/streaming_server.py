"""`python -m benchmarks.streaming_server ENGINE CORE`: a server on any free port, which it prints.

ENGINE is JSON with fields of EngineConfig, CORE the `module:factory` that its engine process runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from specserve.config import EngineConfig, resolve_paths
from specserve.server.options import ServerConfig
from specserve.server.serve import serve

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def served(engine: Mapping[str, object], core: str, **environment: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its URL and process id."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.streaming_server", json.dumps(engine), core],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"The server ended with status {process.wait()}.")
        yield url, process.pid
    finally:
        for _ in range(2):  # the second signal: streams that still run are not waited for
            process.send_signal(signal.SIGTERM)
        process.wait()


def main() -> None:
    engine = resolve_paths(msgspec.json.decode(sys.argv[1], type=EngineConfig))
    config = ServerConfig(port=0, served_model_name=("base",), drain_timeout=0.0)
    asyncio.run(serve(engine, config, core=sys.argv[2], on_ready=lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
