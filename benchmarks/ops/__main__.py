"""Each kernel's time on an 8B shape against its floor on this device, and its error against its reference.

    python -m benchmarks.ops [--only norm,attention_decode] [--results FILE]

A time is the median of replays of a CUDA graph, whose calls take turns on so many buffers that the L2 cache does not
help. The floor is the larger of (bytes that must move) / (rate of a large copy) and (operations) / (rate of a large
bfloat16 product), both rates measured at the start. Errors: the largest difference from a float32 reference as a share
of the largest value, or the share of tokens that differ. Ends with 1 if an error is beyond LIMIT or a kernel fails.
On a CPU the references run on tiny shapes, which shows that the benchmark works and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.ops import (
    activation,
    attention_decode,
    attention_prefill,
    bad_words,
    lora,
    lora_layers,
    ngram,
    norm,
    qkv,
    quantised,
    rejection,
    sampling,
    skinny,
    top_k_top_p,
)
from benchmarks.ops.case import FULL, SMALL, Case, Cases, Setting
from benchmarks.ops.timing import Rates, measure_rates, micros
from benchmarks.record import append, surroundings
from specserve_kernels.tolerances import OP

OPS: Mapping[str, Cases] = MappingProxyType(
    {
        "norm": norm.cases,
        "activation": activation.cases,
        "qkv": qkv.cases,
        "attention_decode": attention_decode.cases,
        "attention_prefill": attention_prefill.cases,
        "skinny": skinny.cases,
        "quantised": quantised.cases,
        "sampling": sampling.cases,
        "bad_words": bad_words.cases,
        "top_k_top_p": top_k_top_p.cases,
        "rejection": rejection.cases,
        "lora": lora.cases,
        "lora_layers": lora_layers.cases,
        "ngram": ngram.cases,
    }
)
NO_GPU = "No GPU here: references on tiny shapes show that the benchmark works. Their times and shares mean nothing."
LIMIT = OP[torch.bfloat16][0]
Row = dict[str, object]


def measure(op: str, case: Case, rates: Rates, device: torch.device) -> Row:
    """What one case took and how far off its result is."""
    error = case.error()
    taken, floor = micros(case.calls, device), rates.floor_micros(case.bytes, case.flops)
    by_memory = case.bytes / rates.copy >= case.flops / rates.product
    return {
        "op": op, "case": case.name, "us": round(taken, 2),
        "floor_us": round(floor, 2), "share": round(floor / taken, 3),
        "rate": round((case.bytes if by_memory else case.flops) / taken / 1e6, 3),
        "unit": "TB/s" if by_memory else "TFLOP/s", "error": float(f"{error:.2g}"), "right": error <= LIMIT,
    }  # fmt: skip


def measured(op: str, setting: Setting, rates: Rates) -> Iterator[Row]:
    """A row a case. One kernel's failure must not hide the others' figures."""
    try:
        for case in OPS[op](setting):
            yield measure(op, case, rates, setting.device)
    except Exception as error:
        yield {"op": op, "case": f"{type(error).__name__}: {error}"[:200], "right": False}


def line(row: Row) -> str:
    """The row as the table prints it."""
    if "us" not in row:
        return f"{row['op']:18}FAILED {row['case']}"
    rate = f"{row['rate']:.2f} {row['unit']}" if row["unit"] == "TB/s" else f"{row['rate']:.0f} {row['unit']}"
    mark = "" if row["right"] else "  WRONG"
    return f"{row['op']:18}{row['case']:38}{row['us']:10.2f}{rate:>14}{row['share']:10.0%}{row['error']:10.1e}{mark}"


@torch.inference_mode()
def run(ops: Sequence[str], setting: Setting, results: Path | None = None) -> list[Row]:
    """Measure and print these ops; the rows, which `results` keeps with where they were measured."""
    torch.manual_seed(0)
    rates, where = measure_rates(setting.device), surroundings(str(setting.device))
    limits = {"copy_tb_s": round(rates.copy / 1e12, 3), "product_tflop_s": round(rates.product / 1e12, 1)}
    if setting.device.type != "cuda":
        print(NO_GPU)
    print(f"{where['device']}: {limits['copy_tb_s']} TB/s, {limits['product_tflop_s']} TFLOP/s")
    print(f"{'op':18}{'case':38}{'µs':>10}{'rate':>14}{'of floor':>10}{'error':>10}", flush=True)
    rows = []
    for op in ops:
        for row in measured(op, setting, rates):
            rows.append(row)
            print(line(row), flush=True)
            if results is not None:
                append(results, where | limits | row)
        torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(OPS), help=", ".join(OPS))
    parser.add_argument("--results", type=Path, help="a file of JSON lines to add to")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.only) - set(OPS))
    if unknown:
        parser.error(f"--only: no such op: {', '.join(unknown)}; there are {', '.join(OPS)}")
    rows = run(args.only, FULL if torch.cuda.is_available() else SMALL, args.results)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
