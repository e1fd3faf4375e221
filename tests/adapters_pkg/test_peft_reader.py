"""What the reader takes in equals what PEFT computes; what it cannot serve exactly it refuses by name."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from specserve.core.errors import AdapterError
from specserve_adapters.adapter_files import WeightsFile, hash_adapter, version_of
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.peft_config import parse_config
from specserve_adapters.peft_reader import read_adapter
from specserve_adapters.spec import LinearSpec

MODULES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def read(path: Path, specs: list[LinearSpec], **settings: Any) -> HostAdapter:
    return read_adapter(path, specs, **{"max_rank": 16, "dtype": torch.float64, **settings}).adapter


def random_settings(rng: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "r": rng.choice([1, 3, 4, 8]),
        "lora_alpha": rng.choice([1, 8, 12]),
        "use_rslora": rng.random() < 0.5,
        "target_modules": [name.split(".")[1] for name in rng.sample(MODULES, rng.randint(1, 7))],
    }
    if rng.random() < 0.5:
        settings["layers_to_transform"] = rng.choice([0, [1], [0, 1]])
        settings["layers_pattern"] = rng.choice([None, "layers", ["blocks", "layers"]])
    if rng.random() < 0.5:
        settings["rank_pattern"] = {rng.choice(["q_proj", "layers.0.self_attn.q_proj", "layers.1.*", ".*mlp.*"]): 5}
    if rng.random() < 0.5:
        settings["alpha_pattern"] = {rng.choice(["^model.layers.0.*", "(down|v)_proj", "_proj", "proj"]): 7}
    return settings


@pytest.mark.parametrize("seed", range(12))
def test_deltas_equal_peft(seed: int, make_adapter: Any, specs: list[LinearSpec], tmp_path: Path) -> None:
    settings = random_settings(random.Random(seed))
    model = make_adapter(tmp_path, seed=seed, **settings)
    adapter = read(tmp_path, specs)
    wanted = {
        name.removeprefix("base_model.model.model.layers."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {f"{layer}.{name}" for layer, name, expert in adapter.factors if expert is None} == wanted.keys()
    for (layer, name, _), (a, b) in adapter.factors.items():
        module = wanted[f"{layer}.{name}"].double()
        torch.testing.assert_close(b @ a, module.get_delta_weight("default"), rtol=1e-12, atol=1e-12)
    assert adapter.rank == max(module.r["default"] for module in wanted.values())
    assert adapter.num_bytes == 8 * sum(a.numel() + b.numel() for a, b in adapter.factors.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"], "layers_to_transform": [0]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
    ],
)
def test_targets_as_peft_resolves_them(
    settings: dict[str, Any], make_adapter: Any, specs: list[LinearSpec], tmp_path: Path
) -> None:
    model = make_adapter(tmp_path, **settings)
    # PEFT resolves "all-linear" when it saves; the literal is what other tools write.
    edit_config(target_modules=settings.get("target_modules", ["q_proj", "v_proj"]))(tmp_path)
    count = sum(isinstance(module, LoraLayer) for module in model.modules())
    assert len(read(tmp_path, specs).factors) == count > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, make_adapter: Any, specs: list[LinearSpec], tmp_path: Path) -> None:
    make_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    a, b = read(tmp_path, specs, dtype=torch.float32).factors[0, "self_attn.q_proj", None]
    assert torch.equal(a, tensors[f"{Q0}.lora_A.weight"].to(dtype).float())
    assert torch.equal(b, tensors[f"{Q0}.lora_B.weight"].to(dtype).float() * 3)  # alpha / r
    half = read(tmp_path, specs, dtype=torch.bfloat16)
    assert half.blob.dtype == torch.bfloat16
    assert half.num_bytes * 2 == read(tmp_path, specs, dtype=torch.float32).num_bytes


def test_adapter_name_in_tensor_names(make_adapter: Any, specs: list[LinearSpec], tmp_path: Path) -> None:
    make_adapter(tmp_path)
    plain = read(tmp_path, specs)
    edit_tensors(lambda tensors: {name[:-6] + "default.weight": t for name, t in tensors.items()})(tmp_path)
    assert torch.equal(read(tmp_path, specs).blob, plain.blob)


def test_a_converted_pissa_adapter_is_plain(base_model: Any, specs: list[LinearSpec], tmp_path: Path) -> None:
    """PiSSA changes the base weights; PEFT's conversion folds the change into the saved adapter."""
    before = {name: weight.double() for name, weight in base_model.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(base_model), config)
    config.init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    config.init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(tmp_path / "t"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    trained = {name: weight.double() for name, weight in model.merge_and_unload().state_dict().items()}
    factors = read(tmp_path / "t", specs).factors
    assert len(factors) == 4
    for (layer, name, _), (a, b) in factors.items():
        weight = f"model.layers.{layer}.{name}.weight"
        torch.testing.assert_close(before[weight] + b @ a, trained[weight], rtol=1e-5, atol=1e-5)


# --- rejections ------------------------------------------------------------------------------------------------------

Edit = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


def edit_config(**settings: Any) -> Edit:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return edit


def edit_tensors(change: Callable[[Tensors], Tensors]) -> Edit:
    def edit(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)

    return edit


def with_tensor(name: str, tensor: torch.Tensor) -> Edit:
    return edit_tensors(lambda tensors: {**tensors, name: tensor})


def without(name: str) -> Edit:
    return edit_tensors(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})


def poison(value: float) -> Edit:
    def change(tensors: Tensors) -> Tensors:
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value
        return tensors

    return edit_tensors(change)


def truncate(name: str, size: int) -> Edit:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def pickle_only(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def cast(dtype: torch.dtype) -> Edit:
    return edit_tensors(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


REJECTIONS: list[tuple[Edit, list[str]]] = [
    (edit_config(use_dora=True), ["use_dora", "DoRA"]),
    (edit_config(bias="all"), ["bias='all'"]),
    (edit_config(lora_bias=True), ["lora_bias"]),
    (edit_config(modules_to_save=["lm_head"]), ["modules_to_save"]),
    (edit_config(fan_in_fan_out=True), ["fan_in_fan_out"]),
    (edit_config(target_parameters=["x"]), ["target_parameters"]),
    (edit_config(trainable_token_indices=[1]), ["trainable_token_indices"]),
    (edit_config(megatron_config={"a": 1}), ["megatron_config"]),
    (edit_config(layer_replication=[[0, 2]]), ["layer_replication"]),
    (edit_config(alora_invocation_tokens=[1]), ["alora_invocation_tokens"]),
    (edit_config(use_qalora=True), ["use_qalora"]),
    (edit_config(use_bdlora={"nblocks": 2}), ["use_bdlora"]),
    (edit_config(kasa_config={"beta": 1}), ["kasa_config"]),
    (edit_config(brand_new_method=True), ["brand_new_method", "not known"]),
    (edit_config(init_lora_weights="pissa"), ["init_lora_weights", "pissa"]),
    (edit_config(init_lora_weights="pissa_niter_4"), ["init_lora_weights"]),
    (edit_config(init_lora_weights="olora"), ["init_lora_weights", "olora"]),
    (edit_config(init_lora_weights="loftq"), ["init_lora_weights", "loftq"]),
    (edit_config(init_lora_weights="corda"), ["init_lora_weights", "corda"]),
    (edit_config(init_lora_weights="lora_ga"), ["init_lora_weights", "lora_ga"]),
    (edit_config(peft_type="IA3"), ["peft_type", "IA3"]),
    (edit_config(r=0), ["r must be at least 1"]),
    (edit_config(r="four"), ["`int`", "$.r"]),
    (edit_config(r=8), [f"{Q0}.lora_A.weight", "[8, 32]", "[4, 32]"]),
    (edit_config(rank_pattern={"q_proj": 6}), [f"{Q0}.lora_A.weight", "[6, 32]", "[4, 32]"]),
    (edit_config(rank_pattern={"q_proj": 0}), ["rank_pattern must be at least 1"]),
    (edit_config(rank_pattern={"(": 4}), ["rank_pattern", "regular expression"]),
    (edit_config(alpha_pattern={"(": 4}), ["alpha_pattern", "regular expression"]),
    (edit_config(target_modules="("), ["target_modules", "regular expression"]),
    (edit_config(target_modules=["q_proj"]), ["layers.0.self_attn.v_proj", "does not target"]),
    (edit_config(target_modules=["q_proj", "v_proj", "up_proj"]), ["targets model.layers.0.mlp.up_proj"]),
    (edit_config(target_modules=["q_proj", "v_proj", "lm_head"]), ["target_modules", "lm_head"]),
    (edit_config(target_modules=".*"), ["target_modules", "embed_tokens"]),
    (edit_config(layers_to_transform=[1]), ["layers.0.self_attn.q_proj", "does not target"]),
    (edit_config(exclude_modules=["q_proj"]), ["layers.0.self_attn.q_proj", "does not target"]),
    (truncate("adapter_config.json", 30), ["adapter_config.json"]),
    (lambda path: (path / "adapter_config.json").write_text("[]"), ["adapter_config.json"]),
    (lambda path: (path / "adapter_config.json").write_text("[" * 100_000), ["adapter_config.json"]),
    (lambda path: (path / "adapter_config.json").write_bytes(b'{"peft_type": "\xff"}'), ["adapter_config.json"]),
    (lambda path: (path / "adapter_config.json").unlink(), ["has no adapter_config.json"]),
    (lambda path: (path / "adapter_model.safetensors").unlink(), ["has no adapter_model.safetensors"]),
    (pickle_only, ["adapter_model.bin", "pickle"]),
    (truncate("adapter_model.safetensors", 0), ["adapter_model.safetensors cannot be read"]),
    (truncate("adapter_model.safetensors", 40), ["adapter_model.safetensors cannot be read"]),
    (truncate("adapter_model.safetensors", -1), ["adapter_model.safetensors cannot be read"]),
    (poison(float("nan")), [f"{Q0}.lora_B.weight", "NaN"]),
    (poison(float("inf")), [f"{Q0}.lora_B.weight", "infinity"]),
    (poison(1e31), [f"{Q0}.lora_B.weight", "beyond ±1e+30"]),
    (without(f"{Q0}.lora_B.weight"), [f"{Q0}.lora_B.weight is missing"]),
    (without(f"{Q0}.lora_A.weight"), [f"{Q0}.lora_A.weight is missing"]),
    (with_tensor(f"{Q0}.lora_A.weight", torch.zeros(4, 33)), [f"{Q0}.lora_A.weight", "[4, 32]", "[4, 33]"]),
    (with_tensor(f"{Q0}.lora_B.weight", torch.zeros(32)), [f"{Q0}.lora_B.weight", "[32, 4]", "[32]"]),
    (with_tensor(f"{Q0}.lora_A.default.weight", torch.zeros(4, 32)), [f"{Q0}.lora_A.weight", "twice"]),
    (with_tensor(f"{Q0}.lora_B.bias", torch.zeros(32)), [f"{Q0}.lora_B.bias", "bias"]),
    (with_tensor(f"{Q0}.lora_magnitude_vector", torch.ones(32)), ["lora_magnitude_vector", "DoRA"]),
    (with_tensor("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 32)), ["lm_head"]),
    (with_tensor("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 50)), ["embeddings"]),
    (with_tensor("base_model.model.model.embed_tokens.weight", torch.zeros(50, 32)), ["embed_tokens.weight"]),
    (with_tensor(Q0.replace("0", "7") + ".lora_A.weight", torch.zeros(4, 32)), ["layers.7", "no such linear"]),
    (with_tensor(Q0.replace("q_proj", "w_proj") + ".lora_A.weight", torch.zeros(4, 32)), ["w_proj", "no such linear"]),
    (edit_tensors(lambda tensors: {}), ["no LoRA tensors"]),
    (cast(torch.float8_e4m3fn), ["float8_e4m3fn", "float16"]),
    (cast(torch.int8), ["int8", "float16"]),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "said"), REJECTIONS, ids=[" ".join(said) for _, said in REJECTIONS])
def test_rejections_name_the_cause(
    edit: Edit, said: list[str], make_adapter: Any, specs: list[LinearSpec], tmp_path: Path
) -> None:
    make_adapter(tmp_path)
    read(tmp_path, specs)  # it was good before
    edit(tmp_path)
    with pytest.raises(AdapterError) as caught:
        read(tmp_path, specs)
    assert [part for part in said if part not in caught.value.message] == [], caught.value.message


def test_limits(make_adapter: Any, specs: list[LinearSpec], tmp_path: Path) -> None:
    make_adapter(tmp_path, r=2, rank_pattern={"v_proj": 8})
    with pytest.raises(AdapterError, match=r"v_proj has rank 8; the largest that is served here is 4"):
        read(tmp_path, specs, max_rank=4)
    edit_tensors(lambda tensors: {name: t * 3e4 for name, t in tensors.items()})(tmp_path)
    with pytest.raises(AdapterError, match=r"overflows float16"):
        read(tmp_path, specs, dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"at most 10 .* --max-host-lora-bytes"):
        read(tmp_path, specs, max_file_bytes=10)
    with pytest.raises(AdapterError, match=r"needs \d+ bytes of host memory; adapters may take 100: .* --max-host"):
        read(tmp_path, specs, max_bytes=100)
    with pytest.raises(AdapterError, match="not a folder"):
        read(tmp_path / "nowhere", specs)


def test_a_pipe_does_not_block(make_adapter: Any, specs: list[LinearSpec], tmp_path: Path) -> None:
    make_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterError, match="not a regular file"):
        read(tmp_path, specs)


def test_harmless_settings_are_taken() -> None:
    data = {"peft_type": "LORA", "lora_dropout": 0.1, "bias": "none", "use_dora": False, "eva_config": {"rho": 2.0}}
    config = parse_config(json.dumps({**data, "init_lora_weights": "eva", "new_switch": None}).encode())
    assert (config.r, config.lora_alpha) == (8, 8)


def test_hash_is_of_contents_and_places(make_adapter: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("copy", 0), ("b", 1)):
        make_adapter(tmp_path / name, seed=seed)
    a, copy, b = (tmp_path / name for name in ("a", "copy", "b"))
    assert hash_adapter(a, None) == hash_adapter(copy, None)
    assert len({hash_adapter(*folders) for folders in ((a, None), (b, None), (a, b), (b, a), (a, a))}) == 5
    edit_config(lora_alpha=13)(copy)
    assert hash_adapter(copy, None) != hash_adapter(a, None)


def test_the_version_is_of_the_bytes_that_were_parsed(
    make_adapter: Any, specs: list[LinearSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is overwritten between its header and its data."""
    make_adapter(tmp_path, seed=2)
    second = (tmp_path / "adapter_model.safetensors").read_bytes()
    version, blob = hash_adapter(tmp_path, None), read(tmp_path, specs).blob
    make_adapter(tmp_path, seed=1)
    read_data = WeightsFile.read_data

    def overwrite(weights: WeightsFile, *args: Any) -> Any:
        with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
            file.write(second)
        return read_data(weights, *args)

    monkeypatch.setattr(WeightsFile, "read_data", overwrite)
    adapter, contents = read_adapter(tmp_path, specs, max_rank=16, dtype=torch.float64)
    assert version_of(contents, None) == version
    assert torch.equal(adapter.blob, blob)
