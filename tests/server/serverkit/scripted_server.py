"""`python -m serverkit.scripted_server MODEL …`: `specserve serve` over the scripted core."""

from __future__ import annotations

import asyncio
import sys

from serverkit import SCRIPTED_CORE
from specserve.cli.main import make_parser
from specserve.cli.serve import configs
from specserve.server.serve import serve

if __name__ == "__main__":
    # The API process needs no torch, and transformers' tokenizers load in half the time where there is none.
    sys.modules["torch"] = None  # type: ignore[assignment]
    engine, server = configs(make_parser().parse_args(["serve", *sys.argv[1:]]))
    asyncio.run(serve(engine, server, core=SCRIPTED_CORE, on_ready=lambda url: print(f"Ready: {url}", flush=True)))
