"""What a draft of one byte a weight costs in acceptance, on real text: the bundled models on this CPU.

    python -m benchmarks.quantised_draft [--drafts 4] [--tokens 192]

Every prompt is answered greedily by the base or its domain's adapter with its companion, as in benchmarks.cpu, with a
fixed number of drafts a round; the texts must be the same whatever the draft's weights are. Also measured: an int8
product of a draft's decode steps as a share of the float32 one's time, by size, which is what "auto" decides by.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.cpu import prompts
from benchmarks.record import append, commit, machine
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.llm import LLM
from specserve.loading.quantization import int8_share

RESULTS = Path(__file__).parent / "results" / "quantised-draft.jsonl"
KINDS = ("none", "fp8", "int8")
SHAPES = {"128 x 896": (128, 896), "1024 x 4096": (1024, 4096), "2048 x 4096": (2048, 4096)}
Counts = tuple[list[list[int]], list[int], list[int]]


def run(kind: str, drafts: int, tokens: int) -> Counts:
    """Texts, and by position how many were drafted and accepted."""
    ids, adapters = prompts()
    llm = LLM(model="demo", dtype="float32", device="cpu", draft_quantization=kind)
    speculation = SpeculationParams(num_draft_tokens=drafts)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, speculation=speculation)
    outputs = llm.generate(ids, params, lora=adapters)
    drafted, accepted = [0] * drafts, [0] * drafts
    for stats in (output.speculation for output in outputs):
        for position, (asked, taken) in enumerate(
            zip(stats.drafted_per_position, stats.accepted_per_position, strict=True)
        ):
            drafted[position] += asked
            accepted[position] += taken
    llm.engine.close()
    return [output.token_ids for output in outputs], drafted, accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    args = parser.parse_args()
    share, first, rounds = {}, {}, {}
    texts = []
    for kind in KINDS:
        text, drafted, accepted = run(kind, args.drafts, args.tokens)
        texts.append(text)
        share[kind] = round(sum(accepted) / sum(drafted), 4)
        first[kind] = round(accepted[0] / drafted[0], 4)
        rounds[kind] = drafted[0]
        print(f"{kind:5} accepted {share[kind]:.1%}, first drafts {first[kind]:.1%}, {rounds[kind]} rounds")
    assert all(text == texts[0] for text in texts), "a draft changed the text"
    times = {name: round(int8_share(*shape), 2) for name, shape in SHAPES.items()}
    print("int8 products' share of float32's time:", times)
    row = {
        "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "drafts": args.drafts, "tokens": args.tokens,
        "accepted": share, "accepted_first": first, "rounds": rounds, "int8_time_share": times,
    }  # fmt: skip
    append(RESULTS, row)
    print(f"Added to {RESULTS.name}.")


if __name__ == "__main__":
    main()
