"""Hundreds of adapters in one batch, of all ranks, some in their prompts and some behind: each is what it is alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lawbook.zoo import Zoo
from specserve.core.messages import AddRequest, LoraRef, RequestOutput
from specserve.core.sampling_params import SamplingParams
from specserve.llm import LLM

Open = Callable[..., LLM]
COUNT = 240
RANKS = (1, 2, 3, 8, 12, 16)
ONE_RANK = 256  # of a single one among them
PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8)


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COUNT adapters of all linears, drawn here: peft would take a minute."""
    source, root = zoo.adapters["near"]["a1"], tmp_path_factory.mktemp("many")
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for index in range(COUNT):
        rank = ONE_RANK if index == COUNT // 2 else RANKS[index % len(RANKS)]
        place = root / name_of(index)
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}))
        save_file(
            {name: drawn(name, tensor, rank, generator) for name, tensor in tensors.items()},
            place / "adapter_model.safetensors",
        )
    return root


def name_of(index: int) -> str:
    return f"x{index:03}"


def drawn(name: str, tensor: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    shape = (rank, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], rank)
    return torch.randn(shape, generator=generator) * 0.3 / rank**0.25


def request(index: int) -> AddRequest:
    """Prompts of 3 to 22 tokens, no two alike."""
    prompt = [5 + (index * 7 + place * (1 + index % 3)) % 50 for place in range(3 + index % 20)]
    return AddRequest(
        request_id=name_of(index), prompt_ids=prompt, params=PARAMS, seed=0, lora=(LoraRef(name_of(index)),)
    )


def answers(llm: LLM, asked: list[AddRequest], *, at_once: int) -> dict[str, list[int]]:
    """`at_once` more of them come before each step, so that steps mix prompts with decodes."""
    said: dict[str, list[int]] = {one.request_id: [] for one in asked}
    rest = iter(asked)
    coming = True
    while coming or llm.engine.has_work():
        more = list(islice(rest, at_once))
        coming = len(more) == at_once
        for one in more:
            llm.engine.add_request(one)
        llm.engine.adapters.wait(10)
        llm.engine.poll_replies()
        for output in llm.engine.step():
            note(said, output)
    return said


def note(said: dict[str, list[int]], output: RequestOutput) -> None:
    assert output.error is None, output.error
    said[output.request_id] += output.token_ids


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_hundreds_in_one_batch(num_drafts: int, folder: Path, open_llm: Open) -> None:
    room = {"max_num_seqs": COUNT, "num_blocks": COUNT * 12, "max_lora_rank": ONE_RANK, "max_num_batched_tokens": 512}
    few = open_llm(loras=(), lora_dirs=(str(folder),), max_loras=4, num_draft_tokens=num_drafts, **room)
    many = open_llm(loras=(), lora_dirs=(str(folder),), max_loras=COUNT, num_draft_tokens=num_drafts, **room)
    asked = [request(index) for index in range(COUNT)]
    together = answers(many, asked, at_once=60)
    assert many.engine.stats().adapter_tiers.slots_used == COUNT
    alone = {}
    for one in asked:
        alone |= answers(few, [one], at_once=1)
    assert together == alone
    assert len({tuple(tokens) for tokens in together.values()}) > 0.9 * COUNT
    base = many.generate([one.prompt_ids for one in asked], PARAMS)
    assert sum(output.token_ids == together[one.request_id] for output, one in zip(base, asked, strict=True)) < 5
