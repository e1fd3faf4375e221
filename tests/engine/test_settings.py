"""Every setting out of range is refused at start, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specserve.config import EngineConfig
from specserve.core.errors import AdapterError, InvalidRequestError, ModelLoadError
from specserve.core.sampling_params import Method, SamplingParams, SpeculationParams
from specserve.engine.core.memory import room_for
from specserve.llm import LLM

Open = Callable[..., LLM]

BAD = [
    ("num_draft_tokens", -1), ("num_draft_tokens", 65), ("seed", 2**63), ("block_size", 0), ("block_size", 4096),
    ("num_blocks", 1), ("kv_cache_bytes", 0), ("gpu_memory_utilization", 0.0), ("gpu_memory_utilization", 1.5),
    ("gpu_memory_utilization", float("nan")), ("max_model_len", 0), ("max_num_seqs", 0), ("max_num_batched_tokens", 0),
    ("max_num_batched_tokens", 3), ("max_waiting", -1), ("pipeline_depth", 0), ("pipeline_depth", 3), ("max_loras", -1),
    ("max_lora_rank", 0), ("max_host_lora_bytes", -1), ("max_adapters_per_request", 0),
    ("speculation_method", "guess"), ("dtype", "int8"), ("max_num_seqs", 2.5), ("enable_prefix_caching", "yes"),
    ("proposer", "oracle"), ("device", "toaster"), ("max_model_len", 10**6), ("num_blocks", 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}={value}" for name, value in BAD])
def test_refused_by_name(name: str, value: object, open_llm: Open) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        open_llm(**{name: value})
    assert caught.value.param == name
    assert "--" + name.replace("_", "-") in caught.value.message or name == "num_blocks"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_lora_rank": 10**12}, "8 adapters of rank 1000000000000 at a time: lower --max-loras or --max-lora-rank"),
        ({"num_blocks": 10**13}, "10000000000000 KV blocks: give fewer --num-blocks"),
    ],
)
def test_what_no_memory_is_large_enough_for(fields: dict[str, int], said: str, open_llm: Open) -> None:
    with pytest.raises(InvalidRequestError, match="not enough memory for " + said):
        open_llm(**{"max_loras": 8, **fields})


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("build.load_model", r"the weights of .*: free some of the device's, or give --quantization fp8 or int8"),
        ("build.ModelState", "5 adapters of rank 7 at a time: lower --max-loras or"),
        ("memory._budget", "a step of 2048 tokens: lower --max-num-batched-tokens"),
    ],
)
def test_a_full_gpu_is_one_sentence(place: str, said: str, open_llm: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(f"specserve.engine.core.{place}", full)
    with pytest.raises(InvalidRequestError, match="not enough memory for " + said):
        open_llm(num_blocks=None, max_num_batched_tokens=None, max_loras=5, max_lora_rank=7)


def test_no_other_failure_is_called_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), room_for("slots", "lower it", ""):
        raise RuntimeError("shapes differ")


def test_defaults_are_valid() -> None:
    EngineConfig().validate()


@pytest.mark.parametrize("proposer", ["draft_model", "suffix+draft_model"])
def test_draft_model_is_needed_for_its_proposer(proposer: str, open_llm: Open) -> None:
    with pytest.raises(InvalidRequestError, match="draft_model needs --draft-model"):
        open_llm(draft_model=None, proposer=proposer)


@pytest.mark.parametrize("proposer", ["suffix", "ngram+suffix", "suffix+draft_model"])
def test_proposers_are_set_by_name(proposer: str, open_llm: Open) -> None:
    assert open_llm(proposer=proposer).engine.built.default_proposer == proposer


def _model(folder: Path, **sizes: int) -> str:
    shape = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(shape | sizes))).save_pretrained(folder)
    return str(folder)


def test_vocabularies_must_agree(open_llm: Open, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="62 tokens, the target's 61"):
        open_llm(draft_model=_model(tmp_path, vocab_size=62))


def test_shorter_context_of_the_draft(open_llm: Open, tmp_path: Path) -> None:
    """It bounds the context; asking for more is refused."""
    draft = _model(tmp_path, max_position_embeddings=40)
    assert open_llm(draft_model=draft, max_model_len=None).engine.ready.max_model_len == 40
    with pytest.raises(InvalidRequestError, match="exceeds the 40 tokens"):
        open_llm(draft_model=draft, max_model_len=41)


def test_missing_adapter_folder(open_llm: Open, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="sql"):
        open_llm(loras=(("sql", str(tmp_path)),))


def test_no_slots_serves_the_base_model(open_llm: Open) -> None:
    llm = open_llm(max_loras=0)
    assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    with pytest.raises(InvalidRequestError, match="slots"):
        llm.generate([[5, 6]], lora="a0")


@pytest.mark.parametrize(
    ("setting", "seed", "own", "coupled"),
    [
        ("coupled", None, None, True),
        ("rejection", 1, None, False),
        ("auto", 1, None, True),
        ("auto", None, None, False),
        ("coupled", None, "rejection", False),
    ],
)
def test_method_reaches_sampling(
    setting: str, seed: int | None, own: Method | None, coupled: bool, open_llm: Open
) -> None:
    """`speculation_method` holds for all requests; a request's own word goes before it."""
    llm = open_llm(speculation_method=setting)
    llm.generate([[5, 6]], SamplingParams(seed=seed, max_tokens=3, speculation=SpeculationParams(method=own)))
    batch = llm.engine.built.runner.rows.sampling.gather((0,))
    assert (batch.any_coupled, batch.any_rejection) == (coupled, not coupled)
