"""specserve against transformers' `generate` on this CPU, with the bundled models, in one process and one run.

    make bench-cpu          or          python -m benchmarks.cpu [--rounds 7] [--threads 4]

Each request has 128 prompt tokens and 128 new ones, greedy, float32, end of text ignored. Every round runs all variants
one after another, so that a change of the machine's speed meets all of them alike; figures are tokens/s, prefill
included, and their median over rounds. The prefix cache is off, for rounds repeat their prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.record import append, commit, machine
from specserve.config import DEMO_ROOT
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.llm import LLM, Lora

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cpu-demo.jsonl"
NUM_TOKENS = 128  # of prompt, and new
# An adapter's requests bring its own kind of text; the base was trained on Python.
DOMAINS = {"python": None, "sql": "sql", "javascript": "javascript", "docs": "docs"}
BARS = (  # what, variant, against, at least
    ("one request, against generate", "ours 1", "generate 1", 1.5),
    ("8 requests on mixed adapters, against generate's batch of 8 without", "ours 8 mixed", "generate 8", 1.3),
    ("one request, drafts against none", "ours 1", "ours 1, no drafts", 1.15),
)


def prompts() -> tuple[list[list[int]], list[Lora]]:
    """Eight prompts of 128 token ids, and the adapter of each."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_ROOT / "target")
    ids: list[list[int]] = []
    adapters: list[Lora] = []
    for path in sorted((HERE / "prompts").glob("*.txt")):
        tokens = tokenizer.encode(path.read_text())[:NUM_TOKENS]
        assert len(tokens) == NUM_TOKENS, f"{path} has only {len(tokens)} tokens"
        ids.append(tokens)
        adapters.append(DOMAINS[path.stem.split("-")[0]])
    return ids, adapters


def variants(acceptance: dict[str, list[int]]) -> tuple[dict[str, str], dict[str, Callable[[int], int]]]:
    """What our engine is made of, and name → a function of the round that generates once and returns how many tokens;
    ours add to `acceptance`."""
    ids, adapters = prompts()
    alone = [prompt for prompt, adapter in zip(ids, adapters, strict=True) if adapter is None]
    model = AutoModelForCausalLM.from_pretrained(DEMO_ROOT / "target", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    llm = LLM(model="demo", dtype="float32", device="cpu", enable_prefix_caching=False)

    def generate(batch: list[list[int]]) -> int:
        output = model.generate(torch.tensor(batch), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        return int(output.shape[0] * (output.shape[1] - NUM_TOKENS))

    def ours(name: str, batch: list[list[int]], lora: list[Lora], speculation: SpeculationParams) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, speculation=speculation)
        outputs = llm.generate(batch, params, lora=lora)
        drafted, accepted = acceptance.setdefault(name, [0, 0])
        drafted += sum(output.speculation.drafted for output in outputs)
        acceptance[name] = [drafted, accepted + sum(output.speculation.accepted for output in outputs)]
        return sum(len(output.token_ids) for output in outputs)

    def pick(turn: int) -> list[list[int]]:
        return [alone[turn % len(alone)]]

    on = SpeculationParams()
    return llm.engine.ready.facts(), {
        "generate 1": lambda turn: generate(pick(turn)),
        "ours 1": lambda turn: ours("ours 1", pick(turn), [None], on),
        "ours 1, no drafts": lambda turn: ours("ours 1, no drafts", pick(turn), [None], NO_SPECULATION),
        "generate 8": lambda turn: generate(ids),
        "ours 8 mixed": lambda turn: ours("ours 8 mixed", ids, adapters, on),
        "ours 8 mixed, no drafts": lambda turn: ours("ours 8 mixed, no drafts", ids, adapters, NO_SPECULATION),
    }


@torch.inference_mode()
def measure(rounds: int) -> tuple[dict[str, str], dict[str, list[float]], dict[str, float]]:
    """What our engine is made of, tokens/s of each variant in each round, after one round that is not counted, and the
    share of drafts accepted."""
    counts: dict[str, list[int]] = {}
    made, runs = variants(counts)
    for run in runs.values():
        run(0)
    counts.clear()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            tokens = run(turn)
            rates[name].append(round(tokens / (time.perf_counter() - begin), 1))
    return made, rates, {name: round(taken / drafted, 3) for name, (drafted, taken) in counts.items() if drafted}


def report(rates: dict[str, list[float]], acceptance: dict[str, float]) -> dict[str, float]:
    """Print the table; returns the ratio that each bar is about."""
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'':26}{'tokens/s':>10}{'lowest':>10}{'highest':>10}{'accepted':>10}")
    for name, values in rates.items():
        share = f"{acceptance[name]:.0%}" if name in acceptance else ""
        print(f"{name:26}{median[name]:10.1f}{min(values):10.1f}{max(values):10.1f}{share:>10}")
    ratios = {}
    for what, variant, against, bar in BARS:
        ratios[what] = round(median[variant] / median[against], 3)
        print(f"{what}: {ratios[what]:.2f}× (bar {bar}×, {'met' if ratios[what] >= bar else 'missed'})")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made, rates, acceptance = measure(args.rounds)
    ratios = report(rates, acceptance)
    record = {
        "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "threads": args.threads, "torch": torch.__version__, "transformers": transformers.__version__,
        "made": made, "tokens_per_second": rates, "acceptance": acceptance, "ratios": ratios,
    }  # fmt: skip
    append(RESULTS, record)
    print(f"Added to {RESULTS.relative_to(HERE.parent)}.")


if __name__ == "__main__":
    main()
