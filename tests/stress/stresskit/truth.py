"""Who tells the truth: transformers and peft for greedy answers, a quiet engine on merged weights for drawn ones."""

from __future__ import annotations

import math
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lawbook.engines import run_steps
from lawbook.oracles import save_merged
from lawbook.plain import perturbed
from lawbook.zoo import Zoo
from specserve.core.messages import AddRequest, LoraRef
from specserve.core.sampling_params import NO_SPECULATION
from specserve.llm import LLM
from specserve.runtime import runner
from specserve.sampling.batch import SamplingBatch
from specserve.sampling.sample import sample
from stresskit.contents import Library

NEAR_TIE = 1e-3  # of two logits; see lawbook.plain
MAX_ENGINES = 8
Lora = tuple[tuple[str, float], ...]  # (content, scale), sorted; a content once


@dataclass(frozen=True)
class Answer:
    """What a request said. `loras`: the adapters that it may have had, one of which must explain the answer."""

    request: AddRequest
    loras: tuple[Lora, ...]
    tokens: tuple[int, ...]
    stopped: int | None  # the token that ended it, which is not among `tokens`

    @property
    def text(self) -> tuple[int, ...]:
        """Everything that was chosen."""
        return self.tokens if self.stopped is None else (*self.tokens, self.stopped)


def combine(contents: Iterable[frozenset[str]], scales: Iterable[float]) -> tuple[Lora, ...]:
    """Every choice of contents, with the scales of equal contents added up."""
    loras = set()
    for choice in product(*contents):
        summed: dict[str, list[float]] = {}
        for content, scale in zip(choice, scales, strict=True):
            summed.setdefault(content, []).append(scale)
        loras.add(tuple(sorted((content, math.fsum(parts)) for content, parts in summed.items())))
    return tuple(sorted(loras))


class Peft:
    """The target in float32, with any contents active together, each with its scale."""

    def __init__(self, zoo: Zoo, library: Library) -> None:
        self._library = library
        self._base = AutoModelForCausalLM.from_pretrained(zoo.target, dtype=torch.float32).eval()
        self._target = zoo.target
        self._model: PeftModel | None = None
        self._scaling: dict[tuple[LoraLayer, str], float] = {}

    @torch.inference_mode()
    def logits(self, lora: Lora, texts: list[tuple[int, ...]]) -> Tensor:
        """[texts, longest, vocab]; what is past a text's end means nothing, and earlier positions do not see it."""
        longest = max(map(len, texts))
        ids = torch.tensor([text + (0,) * (longest - len(text)) for text in texts])
        logits: Tensor = self._activate(lora)(input_ids=ids).logits
        return logits

    def _activate(self, lora: Lora) -> torch.nn.Module:
        for content, _ in lora:
            self._load(content)
        if not lora or self._model is None:
            return self._base
        self._model.base_model.set_adapter([content for content, _ in lora])
        scales = dict(lora)
        for (layer, content), scaling in self._scaling.items():
            if content in scales:
                layer.scaling[content] = scaling * scales[content]
        return self._model.eval()

    def _load(self, content: str) -> None:
        folder = self._library.folder(content)
        if self._model is None:
            model = AutoModelForCausalLM.from_pretrained(self._target, dtype=torch.float32)
            self._model = PeftModel.from_pretrained(model, folder, content, autocast_adapter_dtype=False)
        elif content in self._model.peft_config:
            return
        else:
            self._model.load_adapter(folder, content, autocast_adapter_dtype=False)
        for module in self._model.modules():
            if isinstance(module, LoraLayer) and content in module.scaling:
                self._scaling[module, content] = module.scaling[content]


class Merged:
    """A request alone, on weights that peft merged: float64 on the CPU, no drafts, no cache, no adapters."""

    def __init__(self, zoo: Zoo, library: Library, root: Path) -> None:
        self._zoo, self._library, self._root = zoo, library, root
        self._engines: OrderedDict[Lora, LLM] = OrderedDict()

    def say(self, lora: Lora, request: AddRequest, before: tuple[int, ...] = ()) -> tuple[int, ...]:
        """What it generates, after `before`."""
        llm = self._engine(lora)
        alone = AddRequest(
            request_id="alone",
            prompt_ids=request.prompt_ids,
            params=replace(request.params, speculation=NO_SPECULATION),
            seed=request.seed,
            output_ids=list(before),
        )
        return run_steps(llm, [alone])["alone"]

    def is_near_tie(self, lora: Lora, request: AddRequest, before: tuple[int, ...]) -> bool:
        """Whether the choice after `before` would be another one, had each logit been off by half of NEAR_TIE."""
        found: list[bool] = []

        def spy(logits: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
            chosen = sample(logits, batch, positions)
            if not found:
                others = [sample(other, batch, positions) for other in perturbed(logits)]
                found.append(any(not torch.equal(other, chosen) for other in others))
            return chosen

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "sample", spy)
            self.say(lora, request, before)
        return found[0]

    def _engine(self, lora: Lora) -> LLM:
        if lora not in self._engines:
            if len(self._engines) == MAX_ENGINES:
                self._engines.popitem(last=False)[1].close()
            folder = self._root / "merged"
            shutil.rmtree(folder, ignore_errors=True)
            paths = {content: self._library.folder(content) for content, _ in lora}
            zoo = Zoo(self._zoo.target, self._zoo.drafts, {"near": paths})
            save_merged(zoo, tuple(LoraRef(content, scale) for content, scale in lora), folder)
            self._engines[lora] = LLM(
                model=str(folder), dtype="float64", device="cpu", block_size=8, max_model_len=64, max_num_seqs=1,
                num_blocks=9, max_loras=0, enable_prefix_caching=False, pipeline_depth=1,
            )  # fmt: skip
        self._engines.move_to_end(lora)
        return self._engines[lora]

    def close(self) -> None:
        for llm in self._engines.values():
            llm.close()


@dataclass
class Judge:
    """Holds answers against the truth, many at a time; `excused` of `compared` parted from it at a near tie."""

    peft: Peft
    merged: Merged
    compared: int = 0
    ambiguous: int = 0
    excused: int = 0

    def hear(self, answers: list[Answer]) -> list[str]:
        """What is wrong with them."""
        self.compared += len(answers)
        self.ambiguous += sum(len(answer.loras) > 1 for answer in answers)
        explained: set[int] = set()
        for turn in range(max((len(answer.loras) for answer in answers), default=0)):
            groups: dict[Lora, list[int]] = {}
            for index, answer in enumerate(answers):
                if turn < len(answer.loras) and index not in explained:
                    groups.setdefault(answer.loras[turn], []).append(index)
            for lora, indices in groups.items():
                greedy = [i for i in indices if answers[i].request.params.greedy]
                explained.update(self._greedy(lora, {i: answers[i] for i in greedy}))
                explained.update(i for i in set(indices) - set(greedy) if self._is_drawn(lora, answers[i]))
        return [
            f"{answer.request} said {answer.text}, and none of {answer.loras} says so"
            for index, answer in enumerate(answers)
            if index not in explained
        ]

    def _greedy(self, lora: Lora, answers: dict[int, Answer]) -> list[int]:
        """Those whose every token is peft's likeliest, given what came before: one forward for all."""
        if not answers:
            return []
        texts = [(*answer.request.prompt_ids, *answer.text) for answer in answers.values()]
        good = []
        for index, answer, logits in zip(answers, answers.values(), self.peft.logits(lora, texts), strict=True):
            start = len(answer.request.prompt_ids) - 1
            chosen_from = logits[start : start + len(answer.text)]  # [N, vocab]
            chosen = chosen_from[torch.arange(len(answer.text)), list(answer.text)]
            gap = (chosen_from.max(-1).values - chosen).max()
            if gap < NEAR_TIE:
                good.append(index)
                self.excused += bool(gap > 0)
        return good

    def _is_drawn(self, lora: Lora, answer: Answer) -> bool:
        """Whether the request says so alone, with the merged weights and its own seed."""
        alone = self.merged.say(lora, answer.request)
        if answer.tokens == alone:
            return True
        pairs = zip(answer.tokens, alone, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(answer.tokens), len(alone)))
        excused = self.merged.is_near_tie(lora, answer.request, alone[:same])
        self.excused += excused
        return excused
