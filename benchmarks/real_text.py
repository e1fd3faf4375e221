"""What draft companions give on real text: acceptance and speed for each domain, with the base's draft and their own.

    python -m benchmarks.real_text WORK [--minutes 8] [--corpus corpus.jsonl.xz] [--output ROWS.jsonl] [--tiny]

It trains, from nothing and offline, a target of 140 M parameters on Python, a draft of 10 M, and a LoRA of rank 16 for
each other domain of the corpus; distils a companion for each with `specserve.distillation`; and lets the engine
continue held-out text: without drafts, drafted by the base's draft, drafted with the companion. Text is that of the
machine's own packages, or the demo models' corpus (`--corpus`, written by examples/train_demo.py). Stages whose files
are in WORK are skipped. On a GPU it takes about `--minutes`; `--tiny` runs every stage on a CPU in less than two, and
its figures mean nothing.

α is the share of rounds whose first draft is accepted, at temperature 0.8 by rejection: what Σ min(p, q) is for drafts
met in practice. An adapter moves the target away from the base's draft, which costs acceptance: of that loss, measured
against the target without the adapter on the same text, a companion wins a share back,

    won back = (α companion - α base draft) / (α without adapter - α base draft).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append, surroundings
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.distillation.distill import distill
from specserve.distillation.engines import release_memory
from specserve.distillation.measure import counted, dressed
from specserve.distillation.report import Report
from specserve.distillation.settings import DistillSettings
from specserve.llm import LLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))  # scripts, not a package: their stages are used again here

from demo_training import corpus, tokens  # noqa: E402

from benchmarks import real_text_corpus, real_text_models  # noqa: E402
from benchmarks.real_text_models import GPU, TINY, Run  # noqa: E402

RESULTS = HERE / "results" / "real-text.jsonl"
NUM_DRAFTS = 4
AT_ONCE = 8  # requests in a batch
TEMPERATURE = 0.8
LEARNING_RATE = 3e-3  # of companions
BASE = "python"  # the row of the base model without adapters
WITHOUT = "no adapter"  # the base model and its draft, on a domain's text
Drafters = dict[str, str | None]  # who drafts → the adapter's name in the engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and texts")
    parser.add_argument("--minutes", type=float, default=8.0, help="of everything, about")
    parser.add_argument("--corpus", type=Path, help="corpus.jsonl.xz of examples/train_demo.py")
    parser.add_argument(
        "--output", type=Path, help=f"default: {RESULTS.name} among the results, or WORK/rows.jsonl if tiny"
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    run = Run(args.work, TINY if args.tiny else GPU, device, 60 * args.minutes)
    output = args.output or (args.work / "rows.jsonl" if args.tiny else RESULTS)
    seconds: dict[str, float] = {}
    with Stage(seconds, "corpus"):
        prepare(run, args.corpus)
    with Stage(seconds, "target"):
        real_text_models.train_target(run)
    with Stage(seconds, "draft"):
        real_text_models.train_draft(run)
    domains = run.domains()
    with Stage(seconds, "adapters and companions"):
        reports = dress(run, domains)
    with Stage(seconds, "measuring"):
        made, cells = measure(run, domains)
    around = surroundings(device) | {"made": made, "tiny": args.tiny, "models": sizes(run), "seconds": seconds}
    for row in rows(cells, reports):
        append(output, around | row)
    show(cells, reports)
    print(f"Added to {output}; {sum(seconds.values()):.0f} s.")


class Stage:
    """Says what begins, and notes the seconds that it took."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        print(f"{self._name} …", flush=True)
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        release_memory()
        self._seconds[self._name] = round(time.perf_counter() - self._begin, 1)


def prepare(run: Run, path: Path | None) -> None:
    """Corpus, tokenizer and token arrays."""
    if (run.work / "tokens.npz").exists():
        return
    everything = corpus.read(path) if path is not None else real_text_corpus.installed_text(run.scale.corpus)
    documents = [document for document in everything if document.kind == "text"]
    tokenizer = tokens.train(documents, run.scale.vocab_size, run.scale.window)
    tokenizer.save_pretrained(run.work / "tokenizer")
    tokens.encode(documents, tokenizer, run.work / "tokens.npz")


def dress(run: Run, domains: Sequence[str]) -> dict[str, Report]:
    """An adapter and its companion for each domain. On a GPU, which none of them fills, all at once."""
    if run.device == "cpu":
        return {domain: adapter_and_companion(run, domain) for domain in domains}
    with ProcessPoolExecutor(len(domains), get_context("spawn")) as pool:
        runs = [replace(run) for _ in domains]  # without the windows, which lie on the device
        return dict(zip(domains, pool.map(adapter_and_companion, runs, domains), strict=True))


def adapter_and_companion(run: Run, domain: str) -> Report:
    real_text_models.train_adapter(run, domain)
    release_memory()
    report = companion(run, domain)
    print(f"{domain}\n{report.text()}", flush=True)
    return report


def companion(run: Run, domain: str) -> Report:
    """Distil the domain's companion, on beginnings of its training text."""
    scale, prompts = run.scale, run.work / f"{domain}-prompts.jsonl"
    generator = torch.Generator().manual_seed(6)
    ids = run.windows.random({f"{domain}.text": 1.0}, scale.samples, scale.prompt_tokens, generator)
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in ids.tolist()))
    settings = DistillSettings(
        name=domain, adapter=str(run.adapter(domain)), prompts=str(prompts), model=str(run.target),
        draft_model=str(run.draft), samples=scale.samples, max_new_tokens=scale.new_tokens, temperature=TEMPERATURE,
        rank=scale.rank, steps=scale.distill_steps, batch_size=scale.distill_batch, learning_rate=LEARNING_RATE,
        device=run.device, force=True,
    )  # fmt: skip
    return distill(settings)


def measure(run: Run, domains: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[str, dict[str, Any]]]]:
    """What the engine is made of, and {domain: {"greedy" or "sampled": {who drafts: figures}}}; the base's own domain
    first."""
    folders = {domain: run.adapter(domain) for domain in domains}
    plain = {f"{name}-plain": dressed(folder, None, run.work / "plain" / name) for name, folder in folders.items()}
    llm = LLM(
        model=str(run.target), draft_model=str(run.draft), device=run.device, max_num_seqs=AT_ONCE,
        dtype="bfloat16" if run.device == "cuda" else "float32", max_loras=2 * len(domains),
        enable_prefix_caching=False,
        loras=tuple((name, str(path)) for name, path in (folders | plain).items()),
    )  # fmt: skip
    drafters: dict[str, Drafters] = {BASE: {"base draft": None}}
    drafters |= {domain: {"base draft": f"{domain}-plain", "companion": domain, WITHOUT: None} for domain in domains}
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for domain, names in drafters.items():
        prompts = run.windows.held_out(f"{domain}.text", run.scale.prompts, run.scale.prompt_tokens).tolist()
        cells[domain] = {
            kind: {"no drafts": cell(run, llm, prompts, names["base draft"], temperature, NO_SPECULATION)}
            | {who: cell(run, llm, prompts, name, temperature, _drafts()) for who, name in names.items()}
            for kind, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE))
        }
    llm.close()
    return llm.engine.ready.facts(), cells


def _drafts() -> SpeculationParams:
    return SpeculationParams(num_draft_tokens=NUM_DRAFTS, method="rejection", proposer="draft_model")


def cell(
    run: Run, llm: LLM, prompts: list[list[int]], lora: str | None, temperature: float, speculation: SpeculationParams
) -> dict[str, Any]:
    """Tokens/s, prefill included, and what was accepted; a first, shorter go warms up."""
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=run.scale.new_tokens,
            ignore_eos=True,
            seed=seed,
            speculation=speculation,
        )
        for seed in range(len(prompts))
    ]
    llm.generate(prompts[:AT_ONCE], params[:AT_ONCE], lora=lora)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, lora=lora)
    rate = sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - begin)
    found: dict[str, Any] = {"tokens_per_second": round(rate, 1)}
    if speculation.num_draft_tokens:
        counts = counted(outputs)
        found |= {
            "alpha": round(counts.first_accepted, 4), "accepted": round(counts.accepted, 4),
            "tokens_per_round": round(counts.tokens_per_round, 3),
        }  # fmt: skip
    return found


def rows(cells: dict[str, dict[str, dict[str, Any]]], reports: dict[str, Report]) -> list[dict[str, Any]]:
    """A row a domain: the cells, speedups over no drafts, and the share of the lost acceptance that was won back."""
    found = []
    for domain, kinds in cells.items():
        row: dict[str, Any] = {"domain": domain, "batch": AT_ONCE, "drafts": NUM_DRAFTS, "cells": kinds}
        row["speedup"] = {
            kind: {
                who: round(figures["tokens_per_second"] / by["no drafts"]["tokens_per_second"], 3)
                for who, figures in by.items()
                if who not in ("no drafts", WITHOUT)
            }
            for kind, by in kinds.items()
        }
        if domain in reports:
            row["won_back"] = won_back(kinds["sampled"])
            row["distilled"] = {
                name: {"alpha": round(one.alpha, 4), "greedy": round(one.greedy, 4)}
                for name, one in reports[domain].acceptance.items()
            }
        found.append(row)
    return found


def won_back(by: dict[str, dict[str, Any]]) -> float | None:
    """Of the acceptance that the adapter cost; None where it cost less than a point."""
    lost = by[WITHOUT]["alpha"] - by["base draft"]["alpha"]
    gained: float = by["companion"]["alpha"] - by["base draft"]["alpha"]
    return round(gained / lost, 3) if lost >= 0.01 else None


def sizes(run: Run) -> dict[str, Any]:
    return {
        "target": run.scale.target,
        "draft": run.scale.draft,
        "vocab_size": run.scale.vocab_size,
        "rank": run.scale.rank,
    }


def show(cells: dict[str, dict[str, dict[str, Any]]], reports: dict[str, Report]) -> None:
    """A table: a line for each domain, kind of sampling and drafter."""
    print(f"{'':14}{'':9}{'':12}{'α':>8}{'accepted':>10}{'a round':>9}{'tokens/s':>10}{'speedup':>10}{'won back':>10}")
    for row in rows(cells, reports):
        for kind, by in row["cells"].items():
            for who, figures in by.items():
                drafted = f"{'':27}"
                if "alpha" in figures:
                    drafted = "{alpha:8.1%}{accepted:10.1%}{tokens_per_round:9.2f}".format(**figures)
                speedup, back = row["speedup"][kind].get(who), row.get("won_back")
                line = f"{row['domain']:14}{kind:9}{who:12}{drafted}{figures['tokens_per_second']:10.0f}"
                line += "" if speedup is None else f"{speedup:9.2f}×"
                print(line + (f"{back:10.0%}" if back is not None and (kind, who) == ("sampled", "companion") else ""))


if __name__ == "__main__":
    main()
