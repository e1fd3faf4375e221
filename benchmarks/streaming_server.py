"""`python -m benchmarks.streaming_server MODEL`: the server over the core of streaming_core.py, on any free port."""

from __future__ import annotations

import asyncio
import sys

from specserve.config import EngineConfig, resolve_paths
from specserve.server.options import ServerConfig
from specserve.server.serve import serve

CORE = "benchmarks.streaming_core:PacedCore"


def main() -> None:
    engine = resolve_paths(EngineConfig(model=sys.argv[1], max_num_seqs=4096))
    config = ServerConfig(port=0, served_model_name=("paced",), drain_timeout=0.0)
    asyncio.run(serve(engine, config, core=CORE, on_ready=lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
