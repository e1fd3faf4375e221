"""Write MODEL_CARD.md from what the run measured. Every figure in it is read from the run's own files."""

import json
from pathlib import Path
from typing import Any

from .measure import PROMPT_LENGTHS
from .run import Run
from .settings import ADAPTERS, BASE_MIXTURE, AdapterPlan, Budget
from .sources import PACKAGES
from .stages import SAMPLE_REQUESTS
from .store import load_model

Rows = list[list[object]]


def write(run: Run) -> None:
    """Write the card into the output folder."""
    read = {name: json.loads((run.work / f"{name}.json").read_text()) for name in _INPUTS}
    sections = [_head(run, read), _corpus(read["corpus"]), _recipe(run, read), _losses(read["measurements"]["loss"])]
    sections += [_acceptance(run, read["measurements"]["acceptance"]), _samples(read["measurements"]["samples"])]
    (run.out / "MODEL_CARD.md").write_text("\n\n".join([*sections, _LIMITATIONS, _REPEAT]) + "\n")


_INPUTS = ("corpus", "drafts", "times", "machine", "measurements")


def _table(head: list[object], rows: Rows) -> str:
    lines: Rows = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _size(path: Path) -> str:
    return f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6:.2f} MB"


def _head(run: Run, read: dict[str, Any]) -> str:
    rows: Rows = []
    for name in ("target", "draft"):
        model = load_model(run.out / name, "cpu")
        c = model.config
        shape = f"{c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} heads of {c.head_dim}, "
        shape += f"{c.num_key_value_heads} KV heads, intermediate {c.intermediate_size}"
        count = sum(parameter.numel() for parameter in model.parameters())
        rows.append([f"`{name}`", f"Llama, {shape}", f"{count:,} parameters", _size(run.out / name)])
    for plan in ADAPTERS:
        folder = run.adapter_folder(plan)
        kind = f"{'rsLoRA' if plan.rslora else 'LoRA'} rank {plan.rank}; draft companion rank {plan.companion_rank}"
        rows.append([f"`{plan.bundled_as}/{plan.name}`", kind, "all seven linears", _size(folder)])
    machine, minutes = read["machine"], sum(entry["seconds"] for entry in read["times"].values()) / 60
    return f"""# The demo models of specserve

A small base model, a draft model for it, and LoRA adapters for {", ".join(plan.name for plan in ADAPTERS)},
each with a draft companion (a LoRA for the draft model). They exist to show adapters and speculative decoding at work
without a download, and to test them. They are far too small to be useful for anything else.

{_table(["folder", "what", "parameters", "size"], rows)}

Vocabulary {run.settings.vocab_size} (byte-level BPE, the same for target and draft), tied embeddings, context of
{run.settings.window} tokens, weights stored as float16. Trained from scratch on {machine["date"]} on one
{machine["device"]} (torch {machine["torch"]}); the training stages took {minutes:.1f} minutes in all. Released under
the licence of specserve; the licences of the training text are below."""


def _corpus(corpus: dict[str, Any]) -> str:
    licences = {f"{package.name}=={package.version}": package for package in PACKAGES}
    rows: Rows = []
    for source, (files, characters) in sorted(corpus["sources"].items()):
        package = licences.get(source)
        registry, licence = (package.registry, package.licence) if package else ("-", "PSF-2.0")
        rows.append([source, registry, licence, files, f"{characters / 1e6:.2f}"])
    splits: Rows = [
        [name.replace(".", " / "), files, f"{characters / 1e6:.2f}"]
        for name, (files, characters) in sorted(corpus["splits"].items())
    ]
    return f"""## Corpus

Files of pinned, permissively licensed packages and of the Python standard library. Held-out text is split off by file,
decided by a hash of its name. A file most of whose longer lines were seen before is dropped, and a held-out file
already if more than 40 % of them were. Chat examples are made from the files: a task in words (a docstring's first
sentence, a comment, a title, the names in a statement or a selector), the code as the answer.

{_table(["domain / kind / split", "files or examples", "million characters"], splits)}

Packages used (plain text, after repeats were dropped):

{_table(["source", "registry", "licence", "files", "million characters"], rows)}"""


def _recipe(run: Run, read: dict[str, Any]) -> str:
    settings = run.settings
    mixture = ", ".join(f"{name} {share:.1%}" for name, share in BASE_MIXTURE.items())
    times: Rows = [[name, entry["seconds"], entry.get("steps", "-")] for name, entry in read["times"].items()]
    tried = "; ".join(
        f"{name}: {found['first']:.1%} of first tokens, {found['tokens_per_round']:.2f} tokens a round"
        for name, found in read["drafts"].items()
    )
    return f"""## Training

AdamW (0.9, 0.95), cosine schedule, gradient norm clipped at 1, bfloat16 autocast; a stage ends at its step or its time
limit, whichever comes first.

- **Target**: next token, {_budget(settings.pretrain, settings.window)}. Mixture: {mixture}.
- **Draft**: distilled from the target, half KL divergence and half cross-entropy on the target's best token,
  {_budget(settings.draft, 0)}; three quarters of the rows are text the target wrote itself (three of four batches
  greedily, one sampled), the rest is the base mixture. Candidates tried: {tried}. The last one is kept.
- **Adapters**: next token, 80 % text and 20 % chat of the domain, {_budget(settings.adapter, settings.window)}.
- **Companions**: as the draft, from target + adapter, {_budget(settings.companion, 0)}.

{_table(["stage", "seconds", "steps"], times)}"""


def _budget(budget: Budget, window: int) -> str:
    rows = f"{budget.rows} rows" + (f" of {window} tokens" if window else "")
    rate = f"learning rate {budget.learning_rate:g}"
    return f"{rows} a step, {rate}, at most {budget.steps} steps or {budget.seconds:g} s"


def _losses(loss: dict[str, dict[str, float]]) -> str:
    rows: Rows = []
    for domain in loss["base"]:
        base = loss["base"][domain]
        own = domain.split(".")[0]
        cells = [f"{base:.3f}"]
        for plan in ADAPTERS:
            cell = f"{loss[plan.name][domain]:.3f}"
            cells.append(f"**{cell}** ({loss[plan.name][domain] / base - 1:+.1%})" if plan.name == own else cell)
        rows.append([domain, *cells])
    names: list[object] = [f"+ {plan.name}" for plan in ADAPTERS]
    return f"""## Held-out loss

Nats a token on held-out files; the stored float16 weights, computed in float32. Bold: the adapter's own domain.

{_table(["held-out text", "base", *names], rows)}"""


def _acceptance(run: Run, acceptance: dict[str, dict[str, Any]]) -> str:
    rows = [_acceptance_row(None, acceptance["base"])]
    rows += [_acceptance_row(plan, acceptance[plan.name]) for plan in ADAPTERS]
    prompts = acceptance["base"]["base draft"]["prompts"]
    head: list[object] = ["target", "prompts from", "first token, base draft", "first token, companion"]
    head += ["tokens a round, base draft", "tokens a round, companion", "distinct 4-grams"]
    return f"""## Draft acceptance

Greedy target, rounds of k = 4 greedy draft tokens, {prompts} prompts a row of {", ".join(map(str, PROMPT_LENGTHS))}
tokens from held-out files, {run.settings.new_tokens} new tokens each (counted up to the end of a text). "First token"
is the share of rounds whose first draft token is the target's own; "tokens a round" counts the target's token too, so
5 is the most. The base mixture is 70 % Python, 16 % English, 14 % chat. Stored float16 weights, computed in float32.
The last column is the share of distinct 4-grams in the generated text: small models repeat themselves when greedy, and
repetition is easy to draft.

{_table(head, rows)}"""


def _acceptance_row(plan: AdapterPlan | None, found: dict[str, Any]) -> list[object]:
    base, own = found["base draft"], found.get("companion")
    return [
        f"base + {plan.name}" if plan else "base",
        plan.name if plan else "base mixture",
        f"{base['first']:.1%}",
        f"{own['first']:.1%}" if own else "-",
        f"{base['tokens_per_round']:.2f}",
        f"{own['tokens_per_round']:.2f}" if own else "-",
        f"{base['distinct']:.0%}",
    ]


def _samples(samples: dict[str, dict[str, str]]) -> str:
    request = SAMPLE_REQUESTS[0]
    blocks = [f"`{name}`:\n\n````\n{answers[request]}\n````" for name, answers in samples.items()]
    return f"""## The same request, answered by each

Greedy answers to the chat message "{request}", cut after 120 tokens; not chosen among others.

""" + "\n\n".join(blocks)


_LIMITATIONS = """## Limitations

- The answers have the form of their domain and rarely its sense: wrong code, invented commands, loops of repeated
  text. Never run what these models write.
- English is weak, and is the documentation of programming libraries only. There is no alignment or safety training.
- Package splits are by file: held-out files come from the same packages as the training files, so the losses say how
  well a package's style was learned, not how well code is understood.
- The adapters cost loss on every domain but their own, which is what the matrix shows.
- Held-out sets are small (tens of files in some domains): differences of a few tenths of a percent mean nothing.
- Acceptance is that of this target on greedy text. Sampled text is accepted less often."""

_REPEAT = """## How to repeat it

    python examples/train_demo.py --out DIR

with torch, transformers, peft, tokenizers and npm installed, and a CUDA GPU. Data order and seeds are fixed, but stages
may end by time and GPU sums are not ordered, so another run gives slightly other weights and figures. `--tiny` runs all
stages on a CPU in about a minute, as a test of the script."""
