"""`specserve bench …`: measure servers, or the engine without one."""

from __future__ import annotations

import argparse

from specserve.cli.bench_ab import add_ab
from specserve.cli.bench_kernels import add_kernels
from specserve.cli.bench_offline import add_latency, add_throughput
from specserve.cli.bench_report import add_report
from specserve.cli.bench_serve import add_serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_serve(actions)
    add_ab(actions)
    add_report(actions)
    add_throughput(actions)
    add_latency(actions)
    add_kernels(actions)
