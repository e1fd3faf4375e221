"""`specserve adapters distill`, from the command to the folder that an engine then drafts with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from lawbook.zoo import Zoo
from specserve.cli.main import main
from specserve.config import DEMO_ROOT
from specserve.core.errors import AdapterError, InvalidRequestError, NotFoundError
from specserve.core.messages import ListAdapters
from specserve.distillation import samples as samples_module
from specserve.distillation.distill import distill
from specserve.distillation.settings import DistillSettings, resolve
from specserve.llm import LLM

WEIGHTS = "adapter_model.safetensors"


def flags(settings: DistillSettings, **more: object) -> list[str]:
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__ if name not in ("name", "force")}
    given = {name: value for name, value in (fields | more).items() if value is not None}
    return ["adapters", "distill", settings.name, *(f"--{n.replace('_', '-')}={v}" for n, v in given.items())]


def test_a_companion_pays_and_serves(settings: DistillSettings, adapter: Path) -> None:
    report = distill(settings)
    before, after = report.acceptance["base draft"], report.acceptance["after"]
    assert after.alpha > before.alpha + 0.05
    assert after.sampled_engine.accepted > before.sampled_engine.accepted
    assert report.stored == adapter / "draft"
    assert not (adapter / ".draft.distill").exists()
    llm = LLM(
        model=settings.model, draft_model=settings.draft_model, loras=(("a1", str(adapter)),), device="cpu",
        kv_cache_bytes=1 << 22,
    )  # fmt: skip
    llm.generate([[8, 7, 9]], lora="a1")
    reply = llm.engine.handle(ListAdapters(call_id=0))
    assert reply is not None
    assert (reply.adapters[0].has_draft, reply.adapters[0].rank) == (True, 8)
    llm.close()


def test_interrupted_it_goes_on(
    settings: DistillSettings, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("specserve.distillation.distill.train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(flags(settings)) == 130
    said = capsys.readouterr().err
    assert "the same command goes on" in said
    assert str(adapter / ".draft.distill") in said
    assert not (adapter / "draft").exists()
    monkeypatch.setattr(samples_module, "_sample", None)  # the texts are there
    assert main(flags(settings)) == 0
    assert f"The companion of 'a1' is in {adapter / 'draft'}." in capsys.readouterr().out
    assert not (adapter / ".draft.distill").exists()


def test_a_worse_one_is_refused_unless_forced(
    zoo: Zoo, settings: DistillSettings, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target drafts for itself with the adapter itself, which nothing beats."""
    shutil.copytree(zoo.adapters["self"]["a1"], adapter, dirs_exist_ok=True)
    old = (adapter / "draft" / WEIGHTS).read_bytes()
    command = flags(settings, draft_model=settings.model, steps=2)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "nothing was changed" in said
    assert "before" in said
    assert (adapter / "draft" / WEIGHTS).read_bytes() == old
    assert main([*command, "--force"]) == 0
    assert (adapter / "draft" / WEIGHTS).read_bytes() != old


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"name": "nobody", "adapter": None, "model": "demo"}, NotFoundError, "--adapter PATH.*docs, javascript, sql"),
        ({"name": "sql", "adapter": None, "model": "demo"}, InvalidRequestError, "--output"),
        ({"adapter": "/nonexistent"}, AdapterError, "--adapter /nonexistent has no adapter_config.json"),
        ({"draft_model": None}, InvalidRequestError, "--draft-model is missing"),
        ({"prompts": "/nonexistent"}, InvalidRequestError, "--prompts /nonexistent"),
        ({"temperature": 0.0}, InvalidRequestError, "--temperature"),
        ({"samples": 3}, InvalidRequestError, "--samples"),
    ],
)
def test_refusals_before_anything_is_computed(
    fields: dict[str, object], error: type[Exception], said: str, settings: DistillSettings
) -> None:
    with pytest.raises(error, match=said):
        resolve(replace(settings, **fields))


def test_a_draft_with_another_vocabulary_is_refused(
    settings: DistillSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(settings, draft_model=DEMO_ROOT / "draft")) == 1
    assert "vocabulary has 4096 tokens, the target's 61" in capsys.readouterr().err


def test_texts_longer_than_the_context_are_refused(
    settings: DistillSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(settings, max_new_tokens=1 << 20)) == 1
    assert "--max-new-tokens must be below the models' context of" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts from their beginning; a minute's training is already worth ten points."""
    adapter = Path(shutil.copytree(DEMO_ROOT / "adapters" / "sql", tmp_path / "sql"))
    shutil.rmtree(adapter / "draft")
    settings = DistillSettings(
        name="sql", adapter=str(adapter), samples=256, max_new_tokens=96, steps=100, learning_rate=5e-3, device="cpu"
    )
    report = distill(settings)
    assert report.stored == adapter / "draft"
    assert report.gain > 0.1
