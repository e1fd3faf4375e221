"""A tiny Llama, PEFT adapters for it, and its linears as the forward pass merges them."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from specserve.core.messages import LoraRef
from specserve.core.plan import AdapterLoad
from specserve_adapters.entry import AdapterUse
from specserve_adapters.manager import AdapterManager, LoadTicket
from specserve_adapters.spec import LinearSpec

MakeAdapter = Callable[..., PeftModel]
HIDDEN, INTERMEDIATE, KV, LAYERS = 32, 48, 16, 2


@pytest.fixture(scope="session")
def specs() -> list[LinearSpec]:
    """The tiny model's linears: qkv and gate_up merged, o and down alone."""
    out: list[LinearSpec] = []
    for layer in range(LAYERS):
        out += [
            LinearSpec(
                layer, HIDDEN, (("self_attn.q_proj", HIDDEN), ("self_attn.k_proj", KV), ("self_attn.v_proj", KV))
            ),
            LinearSpec(layer, HIDDEN, (("self_attn.o_proj", HIDDEN),)),
            LinearSpec(layer, HIDDEN, (("mlp.gate_proj", INTERMEDIATE), ("mlp.up_proj", INTERMEDIATE))),
            LinearSpec(layer, INTERMEDIATE, (("mlp.down_proj", HIDDEN),)),
        ]
    return out


@pytest.fixture
def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def make_adapter(base_model: LlamaForCausalLM) -> MakeAdapter:
    """make_adapter(folder, seed=…, **LoraConfig settings) → the PEFT model whose adapter was saved there, B ≠ 0."""

    def make(folder: Path, *, seed: int = 0, **settings: Any) -> PeftModel:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **settings})
        model = get_peft_model(copy.deepcopy(base_model), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(str(folder))
        return model

    return make


WriteAdapter = Callable[..., None]


@pytest.fixture(scope="session")
def write_adapter() -> WriteAdapter:
    """write_adapter(folder, seed, rank=…, width=…): a PEFT folder for layer 0's o_proj, written by hand.

    Its contents depend on the arguments alone; it takes 2 * rank * width values of memory.
    """

    def write(folder: Path, seed: int, rank: int = 2, width: int = HIDDEN) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        prefix = "base_model.model.model.layers.0.self_attn.o_proj"
        tensors = {
            f"{prefix}.lora_A.weight": torch.randn(rank, width, generator=generator),
            f"{prefix}.lora_B.weight": torch.randn(width, rank, generator=generator),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": r".*\.0\..*o_proj"}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return write


Uses = tuple[AdapterUse, ...]


class DrivenManager(AdapterManager):
    """A manager, and what an engine does with it. Loads end when `device` is told so."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.device: deque[AdapterLoad] = deque()  # loads under way, in order

    def drain(self) -> list[LoadTicket]:
        """All reads done, except one that waits for room."""
        tickets = self.poll()
        while self.wait(30):
            tickets += self.poll()
            self.check_integrity()
        return tickets

    def ready(self, *names: str) -> Uses:
        """A request with its adapters in host memory."""
        uses = self.acquire(tuple(LoraRef(name) for name in names))
        self.prepare(uses)
        self.drain()
        assert self.prepare(uses)
        return uses

    def begin(self, uses: Uses) -> list[tuple[int, str]] | None:
        """Take the request's slots: which loads began."""
        taken = self.take_slots(uses)
        self.check_integrity()
        if taken is None:
            return None
        self.device += taken[1]
        return [(load.slot, load.version) for load in taken[1]]

    def end_loads(self, count: int | None = None) -> None:
        """The oldest `count` loads end (None: all)."""
        for _ in range(len(self.device) if count is None else count):
            self.loaded(self.device.popleft())
        self.check_integrity()

    def place(self, uses: Uses) -> list[tuple[int, str]] | None:
        """Take the request's slots; loads end at once."""
        loads = self.begin(uses)
        self.end_loads()
        assert loads is None or self.slots_live(uses)
        return loads

    def finish(self, uses: Uses, *, placed: bool = True) -> None:
        if placed:
            self.release_slots(uses)
        self.release(uses)
        self.check_integrity()

    def load_now(self, name: str, path: Path, **settings: Any) -> LoadTicket:
        ticket = self.load(name, path, **settings)
        assert ticket in self.drain()
        assert ticket.done
        return ticket


@pytest.fixture
def make(specs: list[LinearSpec]) -> Iterator[Callable[..., DrivenManager]]:
    """make(**settings): a manager, by default with 2 slots and more host memory than a test needs."""
    made: list[DrivenManager] = []

    def build(**settings: Any) -> DrivenManager:
        defaults = {"num_slots": 2, "max_rank": 8, "max_host_bytes": 1 << 20, "draft_specs": None}
        types = {"dtype": torch.float32, "draft_dtype": torch.float32}
        made.append(DrivenManager(specs, **{**defaults, **types, **settings}))
        return made[-1]

    yield build
    for manager in made:
        manager.check_integrity()
        manager.close()
