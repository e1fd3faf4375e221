"""The stages of the run, in order. Each one writes files and is skipped when its files are there already."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import nn
from transformers import LlamaForCausalLM

from . import corpus, measure, store, tokens
from .data import Mixture, Windows
from .generation import generate
from .run import Run, timed
from .settings import ADAPTERS, BASE_MIXTURE, AdapterPlan, llama
from .sources import DOMAINS
from .training import distillation_loss, fit, next_token_loss

#: Held-out prompts of the base model's acceptance, and the training prompts that its draft's text starts from.
BASE_PROMPTS = {"python.text": 0.70, "english.text": 0.16, "python.chat": 0.14}
DRAFT_PROMPTS = BASE_MIXTURE | {"python.chat": 0.12}


def prepare(run: Run) -> None:
    """Build the corpus, train the tokenizer, encode."""
    if (run.work / "tokens.npz").exists():
        return
    path = run.work / "corpus.jsonl.xz"
    documents = list(corpus.read(path if path.exists() else corpus.build(run.work, run.tiny)))
    (run.work / "corpus.json").write_text(json.dumps(_corpus_summary(documents), indent=1))
    tokenizer = tokens.train(documents, run.settings.vocab_size, run.settings.window)
    tokenizer.save_pretrained(run.work / "tokenizer")
    tokens.encode(documents, tokenizer, run.work / "tokens.npz")


def _corpus_summary(documents: list[corpus.Document]) -> dict[str, dict[str, list[int]]]:
    """Count [files or chat examples, characters]: of every domain.kind.split, and of every source's plain text."""
    summary: dict[str, dict[str, list[int]]] = {"splits": {}, "sources": {}}
    for document in documents:
        keys = [("splits", f"{document.domain}.{document.kind}.{document.split}")]
        keys += [("sources", document.source)] if document.kind == "text" else []
        for table, key in keys:
            entry = summary[table].setdefault(key, [0, 0])
            entry[0] += 1
            entry[1] += len(document.text) + len(document.reply)
    return summary


def train_target(run: Run) -> None:
    """Train the base model from scratch."""
    folder = run.out / "target"
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(run, run.settings.target)).to(run.device)
    if run.device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)  # one compiled block serves all layers: seconds instead of a minute
    budget = run.settings.pretrain
    with timed(run, "target") as note:
        batches = _batches(run, BASE_MIXTURE, budget.rows, run.settings.window + 1)
        note["steps"] = fit(model, batches, next_token_loss(model), budget, "target")
    store.save_model(model, run.work / "tokenizer", folder)


def _config(run: Run, sizes: dict[str, int]) -> object:
    tokenizer = store.load_tokenizer(run.work / "tokenizer")
    names = {"pad": tokens.PAD, "bos": tokens.BOS, "eos": tokens.EOS, "end": tokens.END}
    ids = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    return llama(sizes, run.settings, ids)


def _batches(run: Run, mixture: Mixture, rows: int, length: int) -> Iterator[torch.Tensor]:
    windows, generator = run.windows(), torch.Generator().manual_seed(1)
    while True:
        yield windows.random(mixture, rows, length, generator)


def train_draft(run: Run) -> None:
    """Distil draft candidates from the target, cheapest first, until one is accepted often enough."""
    folder = run.out / "draft"
    if (folder / "model.safetensors").exists():
        return
    target, windows = store.load_model(run.out / "target", run.device), run.windows()
    with timed(run, "text for the draft"):
        text = _target_text(run, target, DRAFT_PROMPTS, run.settings.base_batches)
    evaluation = measure.written(
        target, measure.prompts_of(windows, BASE_PROMPTS, run.settings.prompts), run.settings.new_tokens
    )
    tried = {}
    for sizes in run.settings.drafts:
        torch.manual_seed(2)
        draft = LlamaForCausalLM(_config(run, sizes)).to(run.device)
        with timed(run, f"draft with {sizes['num_hidden_layers']} layer(s)") as note:
            note["steps"] = _distil(run, draft, target, text, BASE_MIXTURE, "draft")
        found = measure.acceptance(draft, evaluation, run.settings.new_tokens, _ends(target))
        tried[f"{sizes['num_hidden_layers']} layer(s), {run.settings.draft.seconds:.0f} s"] = asdict(found)
        print(f"  draft {sizes}: {found}", flush=True)
        if found.first >= run.settings.wanted_acceptance:
            break
    (run.work / "drafts.json").write_text(json.dumps(tried, indent=1))
    store.save_model(draft, run.work / "tokenizer", folder)


def _ends(model: nn.Module) -> list[int]:
    ends: list[int] = model.config.eos_token_id  # type: ignore[union-attr, assignment]
    return ends


def _target_text(run: Run, target: nn.Module, mixture: Mixture, batches: int) -> torch.Tensor:
    """Return text the target wrote: a quarter of the batches sampled, the rest greedy; [rows, tokens]."""
    settings, windows, generator = run.settings, run.windows(), torch.Generator().manual_seed(3)
    writer = copy.deepcopy(target)  # a copy: rounding the teacher itself would change what is taught
    writer.to(torch.bfloat16 if run.device == "cuda" else torch.float32)
    length, rows = min(96, settings.window // 2), settings.generation_rows
    written = [
        generate(
            writer,
            windows.random(mixture, rows, length, generator),
            settings.generated_tokens,
            temperature=0.8 if index % 4 == 1 else 0.0,
        )
        for index in range(batches)
    ]
    return torch.cat(written)


def _distil(run: Run, student: nn.Module, teacher: nn.Module, text: torch.Tensor, mixture: Mixture, kind: str) -> int:
    """Train `student` on the teacher's own text, and on a quarter as much of the corpus; return the steps made."""
    budget = run.settings.draft if kind == "draft" else run.settings.companion

    def batches() -> Iterator[torch.Tensor]:
        ordinary = _batches(run, mixture, budget.rows // 4, text.shape[1])
        while True:
            rows = torch.randint(0, len(text), (budget.rows - budget.rows // 4,)).to(text.device)
            yield torch.cat([text[rows], next(ordinary)])

    return fit(student, batches(), distillation_loss(student, teacher, hard=0.5), budget, kind)


def train_adapter(run: Run, plan: AdapterPlan) -> None:
    """Train one adapter on its domain, then its draft companion on what target + adapter writes."""
    folder = run.adapter_folder(plan)
    mixture = {f"{plan.name}.text": 0.8, f"{plan.name}.chat": 0.2}
    if not (folder / "adapter_model.safetensors").exists():
        torch.manual_seed(4)
        model = store.new_adapter(store.load_model(run.out / "target", run.device), plan.rank, plan.rslora)
        model.train()
        budget = run.settings.adapter
        with timed(run, f"adapter {plan.name}") as note:
            batches = _batches(run, mixture, budget.rows, run.settings.window + 1)
            note["steps"] = fit(model, batches, next_token_loss(model), budget, plan.name, decay=0.01)
        store.save_adapter(model, folder, "specserve-demo-target")
    if not (folder / "draft" / "adapter_model.safetensors").exists():
        _train_companion(run, plan, mixture)


def _train_companion(run: Run, plan: AdapterPlan, mixture: Mixture) -> None:
    folder = run.adapter_folder(plan)
    target = store.load_adapter(run.out / "target", folder, run.device)
    target.requires_grad_(False)
    torch.manual_seed(5)
    companion = store.new_adapter(store.load_model(run.out / "draft", run.device), plan.companion_rank, False)
    with timed(run, f"companion of {plan.name}") as note:
        text = _target_text(run, target, mixture, run.settings.adapter_batches)
        note["steps"] = _distil(run, companion, target, text, mixture, "companion")
    store.save_adapter(companion, folder / "draft", "specserve-demo-draft")


def measure_all(run: Run) -> None:
    """Measure the stored weights and write `measurements.json`: losses, acceptance, sample answers."""
    windows = run.windows()
    names: list[AdapterPlan | None] = [None, *ADAPTERS]
    kinds = [f"{domain}.text" for domain in DOMAINS] + ["python.chat"]
    held_out = {name: windows.held_out(name, run.settings.held_out_windows, run.settings.window) for name in kinds}
    results: dict[str, dict[str, object]] = {"loss": {}, "acceptance": {}, "samples": {}}
    tokenizer = store.load_tokenizer(run.out / "target")
    for plan in names:
        folder = run.adapter_folder(plan) if plan else None
        name = plan.name if plan else "base"
        target = store.load_adapter(run.out / "target", folder, run.device)
        results["loss"][name] = {key: measure.loss(target, held_out[key]) for key in held_out}
        results["samples"][name] = {ask: measure.answer(target, tokenizer, ask) for ask in SAMPLE_REQUESTS}
        results["acceptance"][name] = _acceptances(run, target, windows, plan)
        print(json.dumps({key: value[name] for key, value in results.items()}, indent=1), flush=True)
    (run.work / "measurements.json").write_text(json.dumps(results, indent=1))


SAMPLE_REQUESTS = ("list all users", "create a table of orders", "add a new item", "style the button")


def _acceptances(run: Run, target: nn.Module, windows: Windows, plan: AdapterPlan | None) -> dict[str, object]:
    """Acceptance on the adapter's own domain (or the base mixture) with the base draft, and with the companion."""
    mixture = {f"{plan.name}.text": 1.0} if plan else BASE_PROMPTS
    texts = measure.written(target, measure.prompts_of(windows, mixture, run.settings.prompts), run.settings.new_tokens)
    companions = {"base draft": None} | ({"companion": run.adapter_folder(plan) / "draft"} if plan else {})
    found: dict[str, object] = {}
    for name, folder in companions.items():
        draft = store.load_adapter(run.out / "draft", folder, run.device)
        found[name] = asdict(measure.acceptance(draft, texts, run.settings.new_tokens, _ends(target)))
    return found


def train_adapters(run: Run) -> None:
    """Train all adapters and their companions."""
    for plan in ADAPTERS:
        train_adapter(run, plan)


STAGES: dict[str, Callable[[Run], None]] = {
    "prepare": prepare,
    "target": train_target,
    "draft": train_draft,
    "adapters": train_adapters,
    "measure": measure_all,
}
