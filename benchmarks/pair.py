"""A target and a draft whose agreement is known, with adapters: Hugging Face folders of random weights.

    python -m benchmarks.pair OUT [--target 8b] [--draft 1b] [--alpha 0.8] [--adapters 8] [--ranks 16] [--companions]
    python -m benchmarks.pair OUT --eps 1.0 --layers 4          the sensitive twin

Every layer runs at full cost. Linears are N(0, 1/fan_in), but o_proj and down_proj, which write to the residual
stream, are eps·N(0, 1/fan_in): with eps = 0.02 the stream stays close to the token's embedding, whose rows are N(0, 1).
The output head maps token v to perm(v): lm_head[perm(v)] = 20/hidden · embed[v], so greedy decoding walks a fixed
permutation of the vocabulary. The draft's permutation agrees with the target's on a share alpha of the vocabulary: each
draft is accepted with probability alpha, whatever came before.

Adapters have lora_A ~ N(0, 1/fan_in) and lora_B ~ N(0, b²/rank), where b = eps on o_proj and down_proj and 0.3 on the
others; alpha = rank. Of fewer --ranks than adapters each comes in turn. With --companions each has a LoRA for the draft
in its subfolder draft/.

What such a pair cannot show is an error: its tokens hardly depend on its layers. The sensitive twin (eps = 1, few
layers, the same widths) is for that: its log-probabilities depend on every weight, cache entry and adapter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import SHAPES, PairSettings, Shape, special_tokens

HEAD_GAIN = 20.0
LORA_SPREAD = 0.3
RESIDUAL_WRITERS = ("o_proj", "down_proj")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WRITERS = 8  # files written at once
MOST_PENDING = 32  # adapters whose weights wait on the device to be written


def permutations(vocab: int, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """The successor of each token, target's and draft's, both [vocab] int64 on the CPU, equal on a share alpha."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randperm(vocab, generator=generator)
    differs = torch.randperm(vocab, generator=generator)[: round((1.0 - alpha) * vocab)]
    draft = target.clone()
    draft[differs] = target[differs.roll(1)]  # a cycle among themselves: a permutation again, equal nowhere
    return target, draft


class FolderWriter:
    """Writes tensors to safetensors files of one folder on threads, so that the next are made meanwhile."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, jobs: list[Future[None]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pool = pool
        self.jobs = jobs
        self.weight_map: dict[str, str] = {}

    def tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        self.weight_map |= dict.fromkeys(tensors, file)
        self.jobs.append(self.pool.submit(_save, self.folder / file, tensors))

    def json(self, file: str, content: object) -> None:
        (self.folder / file).write_text(json.dumps(content, indent=1))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


class Random:
    """Normal tensors from one seeded generator on `device`."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, std: float) -> Tensor:
        out = torch.empty(*shape, device=self.device, dtype=self.dtype)
        return out.normal_(0.0, std, generator=self.generator)

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, device=self.device, dtype=self.dtype)


def write_model(out: FolderWriter, shape: Shape, successor: Tensor, settings: PairSettings, random: Random) -> None:
    """One model whose head maps token v to successor[v]."""
    out.json("config.json", shape.config(settings.dtype))
    _write_tokenizer(out, shape.vocab)
    embed = random.normal(shape.vocab, shape.hidden, std=1.0)
    head = torch.empty_like(embed)
    head[successor.to(embed.device)] = embed * (HEAD_GAIN / shape.hidden)
    out.tensors("embed.safetensors", {"model.embed_tokens.weight": embed})
    out.tensors("head.safetensors", {"lm_head.weight": head, "model.norm.weight": random.ones(shape.hidden)})
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        weights = {
            f"{prefix}{name}.weight": random.normal(fan_out, fan_in, std=_gain(name, 1.0, settings.eps) * fan_in**-0.5)
            for name, (fan_in, fan_out) in shape.linears.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = random.ones(shape.hidden)
        out.tensors(f"layer-{layer:02d}.safetensors", weights)
    out.json("model.safetensors.index.json", {"metadata": {}, "weight_map": out.weight_map})


def _gain(linear: str, gain: float, eps: float) -> float:
    return eps if linear.endswith(RESIDUAL_WRITERS) else gain


def _write_tokenizer(out: FolderWriter, vocab: int) -> None:
    """One token a word: token i reads "t<i>"."""
    words = {f"t{token}": token for token in range(vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    out.json(
        "tokenizer.json",
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
        },
    )  # fmt: skip
    special = {name.removesuffix("_id"): f"t{token}" for name, token in special_tokens(vocab).items()}
    out.json("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", **special})


def write_adapter(out: FolderWriter, shape: Shape, rank: int, eps: float, random: Random) -> None:
    """The weights of one LoRA on all seven linears of every layer, in PEFT's layout."""
    weights = {}
    for layer in range(shape.layers):
        for name, (fan_in, fan_out) in shape.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}."
            spread = _gain(name, LORA_SPREAD, eps) * rank**-0.5
            weights[prefix + "lora_A.weight"] = random.normal(rank, fan_in, std=fan_in**-0.5)
            weights[prefix + "lora_B.weight"] = random.normal(fan_out, rank, std=spread)
    out.tensors(ADAPTER_WEIGHTS, weights)


def write_adapter_config(out: FolderWriter, shape: Shape, rank: int, revision: str) -> None:
    """What PEFT says about it. `revision` changes nothing but the contents: another adapter by its hash."""
    out.json(
        "adapter_config.json",
        {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "revision": revision,
            "base_model_name_or_path": "", "target_modules": [name.split(".")[1] for name in shape.linears],
        },
    )  # fmt: skip


def write_adapters(
    out: Path, settings: PairSettings, ranks: Sequence[int], device: str, files: int | None = None
) -> None:
    """OUT/a0 … with these ranks. Of each rank only the first `files` have weights of their own; the others' files are
    hard links to those, in turn."""
    sources = weight_sources(ranks, files)
    dtype, shapes = DTYPES[settings.dtype], {role: settings.shape(role) for role in ("target", "draft")}
    jobs: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for number, rank in enumerate(ranks):
            for role, sub in (("target", ""), ("draft", "draft"))[: 1 + settings.companions]:
                folder = FolderWriter(out / f"a{number}" / sub, pool, jobs)
                write_adapter_config(folder, shapes[role], rank, f"a{number}")
                if sources[number] == number:
                    random = Random(settings.seed + 100 + 2 * number + (role == "draft"), device, dtype)
                    write_adapter(folder, shapes[role], rank, settings.eps, random)
            if len(jobs) > MOST_PENDING:
                jobs.pop(0).result()
        for job in jobs:
            job.result()
    for number, source in enumerate(sources):
        for sub in ("", "draft")[: 1 + settings.companions] if source != number else ():
            link = out / f"a{number}" / sub / ADAPTER_WEIGHTS
            link.unlink(missing_ok=True)
            link.hardlink_to(out / f"a{source}" / sub / ADAPTER_WEIGHTS)


def weight_sources(ranks: Sequence[int], files: int | None) -> list[int]:
    """Whose weights each adapter has: its own, or those of an earlier one of its rank."""
    sources: list[int] = []
    of_rank: dict[int, list[int]] = {}
    for number, rank in enumerate(ranks):
        own = of_rank.setdefault(rank, [])
        own.append(number if files is None or len(own) < files else own[-files])
        sources.append(own[-1])
    return sources


def write_pair(out: Path, settings: PairSettings, device: str) -> None:
    """OUT/target, OUT/draft, OUT/lora/a0 … and OUT/pair.json."""
    dtype = DTYPES[settings.dtype]
    shapes = {role: settings.shape(role) for role in ("target", "draft")}
    if shapes["target"].vocab != shapes["draft"].vocab:
        raise SystemExit(f"{settings.target} and {settings.draft} have different vocabularies.")
    successors = permutations(shapes["target"].vocab, settings.alpha, settings.seed)
    jobs: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for index, role in enumerate(shapes):
            random = Random(settings.seed + 10 + index, device, dtype)
            write_model(FolderWriter(out / role, pool, jobs), shapes[role], successors[index], settings, random)
        for job in jobs:
            job.result()
    ranks = [settings.ranks[number % len(settings.ranks)] for number in range(settings.adapters)]
    write_adapters(out / "lora", settings, ranks, device)
    content = {name: getattr(settings, name) for name in PairSettings.__dataclass_fields__}
    (out / "pair.json").write_text(json.dumps(content, indent=1))


def ranks_of(text: str) -> tuple[int, ...]:
    return tuple(int(rank) for rank in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    defaults = PairSettings()
    parser.add_argument("--target", default=defaults.target, choices=SHAPES)
    parser.add_argument("--draft", default=defaults.draft, choices=SHAPES)
    parser.add_argument("--alpha", type=float, default=defaults.alpha, help="share of the vocabulary they agree on")
    parser.add_argument(
        "--eps", type=float, default=defaults.eps, help="size of what layers add to the residual stream"
    )
    parser.add_argument("--layers", type=int, help="of both models")
    parser.add_argument("--adapters", type=int, default=defaults.adapters)
    parser.add_argument("--ranks", type=ranks_of, default=defaults.ranks, help="16, or several in turn: 8,16,64")
    parser.add_argument("--companions", action="store_true", help="a LoRA for the draft in each adapter's folder")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--dtype", default=defaults.dtype, choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    out, device = args.pop("out"), args.pop("device")
    begin = time.perf_counter()
    write_pair(out, PairSettings(**args), device)
    print(f"Written {out} in {time.perf_counter() - begin:.1f} s.")


if __name__ == "__main__":
    main()
