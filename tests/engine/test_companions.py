"""Draft companions go wherever their adapters go. The target is its own draft here and a companion the adapter itself,
so that every draft is accepted exactly while the right companion is at work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lawbook.zoo import Zoo
from specserve.core.errors import AdapterError
from specserve.core.messages import AdapterInfo, AddRequest, LoraRef, PinAdapter, SpeculationStats
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.llm import LLM

Open = Callable[..., LLM]
PROMPT = [7, 9, 11, 20, 21, 22, 7, 9, 11]
PARAMS = SamplingParams(
    temperature=0.0, ignore_eos=True, max_tokens=30, speculation=SpeculationParams(num_draft_tokens=4)
)
WEIGHTS = "adapter_model.safetensors"
ALL = 1.0


@pytest.fixture
def folders(zoo: Zoo, tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may change: a0 and a1 with companions, `bare` (a2) without."""
    names = {"a0": "a0", "a1": "a1", "bare": "a2"}
    copies = {
        name: Path(shutil.copytree(zoo.adapters["self"][source], tmp_path / name)) for name, source in names.items()
    }
    shutil.rmtree(copies["bare"] / "draft")
    return copies


@pytest.fixture
def open_self(zoo: Zoo, folders: dict[str, Path], open_llm: Open) -> Open:
    loras = tuple((name, str(path)) for name, path in folders.items())

    def open_self(**fields: object) -> LLM:
        return open_llm(**({"draft_model": str(zoo.target), "loras": loras} | fields))

    return open_self


def share(stats: SpeculationStats) -> float:
    assert stats.drafted > 0
    return stats.accepted / stats.drafted


def accepted(llm: LLM, name: str | None) -> float:
    """The share of a request's drafts that is accepted."""
    return share(llm.generate([PROMPT], PARAMS, lora=name)[0].speculation)


def info(llm: LLM, name: str) -> AdapterInfo:
    return llm.engine.adapters.info(name)


def test_evicted_and_read_again_with_its_adapter(open_self: Open) -> None:
    """One slot, and host memory for one adapter: each request takes both tiers from the one before."""
    roomy = open_self()
    alone = {name: accepted(roomy, name) for name in ("a0", "a1", "bare", None)}
    assert alone["a0"] == alone["a1"] == alone[None] == ALL > alone["bare"]
    largest = max(info(roomy, name).num_bytes for name in ("a0", "a1", "bare"))
    llm = open_self(max_loras=1, max_host_lora_bytes=largest, enable_prefix_caching=False)
    for name in ("a0", "bare", "a1", None, "bare", "a0", "a1"):
        assert accepted(llm, name) == alone[name]
    stats = llm.engine.adapters.stats()
    assert (stats.evictions_host, stats.reads) == (5, 6)
    assert {name: info(llm, name).has_draft for name in ("a0", "a1", "bare")} == {"a0": True, "a1": True, "bare": False}


def test_side_by_side_in_one_batch(open_self: Open) -> None:
    llm = open_self()
    names = ["a0", "bare", None, "a1"]
    alone = {name: accepted(llm, name) for name in names}
    together = llm.generate([PROMPT] * 4, PARAMS, lora=names)
    assert {name: share(output.speculation) for name, output in zip(names, together, strict=True)} == alone


def test_acceptance_is_counted_for_each_adapter(open_self: Open) -> None:
    llm = open_self()
    for name in ("a0", "bare"):
        output = llm.generate([PROMPT], PARAMS, lora=name)[0]
        assert (info(llm, name).drafted, info(llm, name).accepted) == (
            output.speculation.drafted, output.speculation.accepted,
        )  # fmt: skip
    assert (info(llm, "a1").drafted, info(llm, "a1").accepted) == (0, 0)
    stats = llm.engine.stats()
    assert (sum(stats.drafted_per_pos), sum(stats.accepted_per_pos)) == (
        stats.num_draft_tokens, stats.num_accepted_tokens,
    )  # fmt: skip
    assert stats.drafted_per_pos[0] == stats.num_drafts
    assert all(
        accepted <= drafted for accepted, drafted in zip(stats.accepted_per_pos, stats.drafted_per_pos, strict=True)
    )


def test_pinned_it_stays(open_self: Open) -> None:
    llm = open_self(max_loras=2)
    llm.engine.handle(PinAdapter(call_id=1, name="a0"))
    accepted(llm, "a0")
    loads = llm.engine.adapters.stats().loads
    for name in ("a1", "bare", "a1"):
        accepted(llm, name)
    assert accepted(llm, "a0") == ALL
    assert llm.engine.adapters.stats().loads == loads + 3, "the others took turns in the second slot"


def test_a_changed_companion_is_a_new_version(open_self: Open, folders: dict[str, Path]) -> None:
    """It changes how requests that come later are drafted, and not a token of what they say."""
    llm = open_self()
    said = llm.generate([PROMPT], PARAMS, lora="a0")[0]
    version = info(llm, "a0").version
    llm.load_adapter("a0", str(folders["a0"]), replace=True)
    assert info(llm, "a0").version == version, "nothing changed"
    draft = folders["a0"] / "draft"
    shutil.copytree(folders["a1"] / "draft", draft, dirs_exist_ok=True)
    llm.load_adapter("a0", str(folders["a0"]), replace=True)
    changed = info(llm, "a0")
    again = llm.generate([PROMPT], PARAMS, lora="a0")[0]
    assert changed.version != version
    assert again.token_ids == said.token_ids
    assert (again.cached_tokens, share(said.speculation)) == (0, ALL)
    assert share(again.speculation) < ALL
    shutil.rmtree(draft)
    llm.load_adapter("a0", str(folders["a0"]), replace=True)
    removed = info(llm, "a0")
    assert (removed.has_draft, changed.has_draft) == (False, True)
    assert removed.version not in (version, changed.version)
    assert accepted(llm, "a0") < ALL


def test_a_running_request_keeps_its_companion(open_self: Open, folders: dict[str, Path]) -> None:
    llm = open_self()

    def start(name: str) -> None:
        llm.engine.add_request(
            AddRequest(request_id=name, prompt_ids=PROMPT, params=PARAMS, seed=0, lora=(LoraRef("a0"),))
        )

    def run(steps: int) -> dict[str, SpeculationStats]:
        ended: dict[str, SpeculationStats] = {}
        for _ in range(steps):
            llm.engine.adapters.wait(10)
            llm.engine.poll_replies()
            for output in llm.engine.step() if llm.engine.has_work() else ():
                if output.finish_reason is not None:
                    assert output.speculation is not None
                    ended[output.request_id] = output.speculation
        return ended

    start("old")
    assert not run(4)
    shutil.copytree(folders["a1"] / "draft", folders["a0"] / "draft", dirs_exist_ok=True)
    llm.load_adapter("a0", str(folders["a0"]), replace=True)
    start("new")
    ended = run(100)
    assert share(ended["old"]) == ALL > share(ended["new"])


@pytest.fixture
def large(zoo: Zoo, tmp_path: Path) -> Path:
    """A companion of rank 20, where 16 is served."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(zoo.target), LoraConfig(r=20, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def test_refused_companions_say_what_to_do(open_self: Open, folders: dict[str, Path], large: Path) -> None:
    """The adapter is refused with it; what was loaded before goes on being served."""
    llm = open_self()
    folder, draft = folders["a0"], folders["a0"] / "draft"
    assert accepted(llm, "a0") == ALL

    def refusal() -> str:
        with pytest.raises(AdapterError) as raised:
            llm.load_adapter("a0", str(folder), replace=True)
        message = raised.value.message
        assert message.startswith("Adapter 'a0': draft companion: ")
        assert str(draft) in message and "specserve adapters distill a0" in message
        return message

    shutil.copytree(large, draft, dirs_exist_ok=True)
    said = refusal()
    assert "rank 20; the largest that is served here is 16" in said and "--max-lora-rank 20" in said
    (draft / WEIGHTS).write_bytes(b"no weights")
    refusal()
    (draft / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refusal()
    assert accepted(llm, "a0") == ALL
    with pytest.raises(AdapterError, match=r"'a0': draft companion: .*specserve adapters distill a0"):
        open_self()  # registered by a look at its files


def test_a_refused_draft_path_is_the_field_named(open_self: Open, folders: dict[str, Path], large: Path) -> None:
    """Whoever named the companion is told so, not to move folders about."""
    llm = open_self()
    for companion, said in ((large, "rank 20"), (large.parent, "has no adapter_config.json")):
        with pytest.raises(AdapterError, match=said) as raised:
            llm.load_adapter("a0", str(folders["a0"]), draft_path=str(companion), replace=True)
        assert raised.value.param == "draft_path"
        assert "name another draft_path, or none" in raised.value.message
        assert "away" not in raised.value.message
