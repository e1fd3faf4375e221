"""Each stage against something independent: the engine's own answers, peft's forward pass, an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lawbook.zoo import Zoo
from specserve.core.errors import AdapterBusyError, InvalidRequestError
from specserve.core.sampling_params import SamplingParams
from specserve.core.seeds import derive_seed
from specserve.distillation import train as train_module
from specserve.distillation.measure import agreement, measure, overlap
from specserve.distillation.samples import Sample, write_samples
from specserve.distillation.settings import DistillSettings, Job, resolve
from specserve.distillation.teacher import teach
from specserve.distillation.train import forward_kl, train
from specserve.distillation.work import store_companion, work_folder
from specserve.llm import LLM

WEIGHTS = "adapter_model.safetensors"
TEXTS = [Sample([9, 11, 12], [20, 21, 22, 23]), Sample([8], [30]), Sample([14, 15], [16, 17, 18])]


def test_all_of_the_vocabulary_is_the_usual_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 30), torch.randn(7, 30).log_softmax(-1)
    whole = F.kl_div(student.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
    top = teacher.topk(30)
    torch.testing.assert_close(forward_kl(student, top.indices, top.values), whole, rtol=1e-4, atol=1e-5)


def test_some_of_the_vocabulary_bounds_it_from_below() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(7, 30).requires_grad_(), torch.randn(7, 30).log_softmax(-1)
    whole = F.kl_div(student.log_softmax(-1), teacher, log_target=True, reduction="batchmean").item()
    found = [forward_kl(student, *reversed(teacher.topk(k))) for k in (1, 5, 20, 29)]
    assert [loss.item() for loss in found] == sorted(loss.item() for loss in found)
    assert 0 < found[0].item() < found[-1].item() <= whole + 1e-6
    found[1].backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    same = forward_kl(teacher, *reversed(teacher.topk(5)))
    assert abs(same.item()) < 1e-5


def test_samples_are_what_the_engine_says(job: Job) -> None:
    parts = {"train": [[8, 7, 9]] * 3, "held_out": [[8, 7, 9], [10, 7, 11]]}
    with work_folder(job) as work:
        found = write_samples(job, work, parts)
        assert len({tuple(sample.token_ids) for sample in (*found["train"], *found["held_out"])}) > 3
        file = work.samples / "train.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])  # killed while it wrote
        assert write_samples(job, work, parts) == found
        assert file.read_bytes() == whole
    with_adapter = LLM(
        model=job.model, dtype="float32", device="cpu", loras=(("a", str(job.adapter)),), kv_cache_bytes=1 << 22
    )
    base = LLM(model=job.model, dtype="float32", device="cpu", kv_cache_bytes=1 << 22)
    one = found["held_out"][1]
    for llm, lora, ours in ((with_adapter, "a", True), (base, None, False)):
        (output,) = llm.generate([one.prompt_ids], params_of(job, 1, 1), lora=lora)
        ended = [] if output.stop_token_id is None else [output.stop_token_id]
        assert (output.token_ids + ended == one.token_ids) is ours
        llm.close()


def params_of(job: Job, part: int, text: int) -> SamplingParams:
    """Of one text of one part, both counted from 0."""
    settings = job.settings
    seed = derive_seed(derive_seed(settings.seed, 1 + part), 1 + text)
    return SamplingParams(temperature=settings.temperature, max_tokens=settings.max_new_tokens, min_tokens=1, seed=seed)


def test_the_teacher_is_target_with_adapter(job: Job) -> None:
    with work_folder(job) as work:
        teaching = teach(job, work, TEXTS)
        again = teach(job, work, TEXTS)
    assert torch.equal(teaching.logprobs, again.logprobs)
    assert teaching.starts.tolist() == [0, 4, 5, 8]
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job.model), str(job.adapter))
    for text, sample in enumerate(TEXTS):
        ids, logprobs = teaching.of([text], torch.device("cpu"))
        with torch.no_grad():
            logits = oracle(torch.tensor([sample.prompt_ids + sample.token_ids])).logits[0]
        wanted = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logprobs, wanted.gather(1, ids), rtol=1e-4, atol=1e-4)
        assert torch.equal(ids[:, 0], wanted.argmax(-1))


def test_a_resumed_training_ends_where_an_undisturbed_one_does(
    job: Job, settings: DistillSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "STEPS_A_CHECKPOINT", 4)
    with work_folder(job) as work:
        teaching = teach(job, work, TEXTS)
        whole = (train(job, work, TEXTS, teaching) / WEIGHTS).read_bytes()
    other = resolve(replace(settings, work=str(tmp_path / "other")))
    update, steps = train_module._update, list[None]()

    def interrupted(*args: object) -> None:
        if len(steps) == 10:
            raise KeyboardInterrupt
        steps.append(update(*args))  # type: ignore[arg-type]

    with work_folder(other) as work:
        monkeypatch.setattr(train_module, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(other, work, TEXTS, teaching)
        assert not (work.companion / WEIGHTS).exists()
        monkeypatch.setattr(train_module, "_update", lambda *args: steps.append(update(*args)))
        resumed = (train(other, work, TEXTS, teaching) / WEIGHTS).read_bytes()
    assert len(steps) == 10 + settings.steps - 8, "it went on behind the last checkpoint"
    assert resumed == whole


def test_weights_that_are_no_numbers_are_refused(settings: DistillSettings) -> None:
    job = resolve(replace(settings, learning_rate=1e30))
    with work_folder(job) as work:
        with pytest.raises(InvalidRequestError, match=r"diverged before step \d+.*--learning-rate"):
            train(job, work, TEXTS, teach(job, work, TEXTS))
        assert not (work.companion / WEIGHTS).exists()
        assert not (work.training / "checkpoint.pt").exists()


def test_a_step_takes_each_text_once_a_pass(settings: DistillSettings) -> None:
    texts = [text for step in range(6) for text in train_module._texts_of(step, 12, settings)]
    assert all(sorted(texts[begin : begin + 12]) == list(range(12)) for begin in range(0, 48, 12))
    assert texts[:12] != texts[12:24]


def test_shares_of_tokens() -> None:
    target, draft = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])
    assert overlap(target.log(), draft.log(), 1.0).tolist() == pytest.approx([0.2 + 0.3 + 0.2, 0.1 + 0.6 + 0.1])
    cold = target**2 / (target**2).sum(1, keepdim=True), draft**2 / (draft**2).sum(1, keepdim=True)
    assert overlap(target.log(), draft.log(), 0.5).tolist() == pytest.approx(torch.minimum(*cold).sum(1).tolist())
    assert agreement(target, draft).tolist() == [0, 1]


def test_the_target_as_its_own_draft_is_always_accepted(zoo: Zoo, settings: DistillSettings, tmp_path: Path) -> None:
    """With the adapter itself as the companion; without it, drafts are the base model's."""
    job = resolve(replace(settings, draft_model=str(zoo.target)))
    prompts = [[first, 7, 9] for first in range(10, 16)]
    with work_folder(job) as work:
        texts = write_samples(job, work, {"held_out": prompts})["held_out"]
        found = measure(job, texts, {"base draft": None, "itself": job.adapter}, tmp_path / "measured")
    itself, base = found["itself"], found["base draft"]
    assert (itself.alpha, itself.greedy) == (pytest.approx(1.0, abs=1e-4), 1.0)
    assert itself.greedy_engine.accepted == itself.greedy_engine.first_accepted == 1.0
    assert itself.sampled_engine.accepted > 0.99
    assert base.alpha < 0.7
    assert base.sampled_engine.accepted < 0.7
    assert 0 < (itself.alpha_error or 0) < 0.1  # all of not many tokens
    assert 0 < (base.alpha_error or 0) < 0.3
    assert 0 < (base.sampled_engine.tokens_per_round_error or 0) < 2
    assert base.greedy_engine.tokens_per_round < itself.greedy_engine.tokens_per_round


def test_a_stored_companion_replaces_the_whole_folder(tmp_path: Path) -> None:
    new, output = tmp_path / "new", tmp_path / "adapter" / "draft"
    new.mkdir()
    (new / "a").write_text("new")
    store_companion(new, output)
    (output / "b").write_text("left over")
    (tmp_path / "adapter" / ".draft.new").mkdir()  # of a run that was killed
    store_companion(new, output)
    assert [file.name for file in output.iterdir()] == ["a"]
    assert [file.name for file in output.parent.iterdir()] == ["draft"]


def test_one_run_at_a_time(job: Job) -> None:
    with work_folder(job), pytest.raises(AdapterBusyError, match=r"at work in .*\.draft\.distill"), work_folder(job):
        pass


def test_texts_outlive_another_training(job: Job, settings: DistillSettings) -> None:
    with work_folder(job) as first:
        pass
    with work_folder(resolve(replace(settings, learning_rate=0.1))) as other:
        assert (other.samples, other.root) == (first.samples, first.root)
        assert other.training != first.training
    with work_folder(resolve(replace(settings, temperature=0.7))) as other:
        assert other.samples != first.samples
