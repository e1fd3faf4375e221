"""What a folder that cannot be served gets: one plain sentence that names the file, tensor or setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specserve.core.errors import ModelLoadError
from specserve.loading import load_model
from specserve.loading.model import resolve_dtype

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def rejected(path: Path | str, *words: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_model(str(path))
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def configure(path: Path, **settings: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


def test_no_such_folder(tmp_path: Path) -> None:
    rejected(tmp_path / "nowhere", "nowhere", "not a folder")
    rejected("./nowhere", "not a folder")
    (tmp_path / "file").write_text("")
    rejected(tmp_path / "file", "not a folder")


def test_names_that_are_no_hub_id() -> None:
    rejected("a/b/c", "neither a folder nor a hub id")


def test_a_hub_id_that_is_not_cached_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    rejected("nobody/nothing", "nobody/nothing", "hub")


def test_empty_folder(tmp_path: Path) -> None:
    rejected(tmp_path, "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "", '{"model_type": "no_such_type"}', "{}"])
def test_broken_config(text: str, save: Any) -> None:
    path = save().path
    (path / "config.json").write_text(text)
    rejected(path, "config.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "LlamaForCausalLM")),
        ({"architectures": None}, ("none named",)),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                              "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}, ("longrope",)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ("factor",)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None}}, ("linear",)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         ("partial_rotary_factor",)),
        ({"num_key_value_heads": 3}, ("4", "3", "heads")),
    ],
)  # fmt: skip
def test_unsupported_config(settings: dict[str, Any], words: tuple[str, ...], save: Any) -> None:
    path = save().path
    configure(path, **settings)
    rejected(path, *words)


@pytest.mark.parametrize("window", [0, None])
def test_sliding_layers_without_a_window(window: int | None, save: Any) -> None:
    path = save("Qwen3", head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=0).path
    configure(path, sliding_window=window)
    rejected(path, "sliding_window", str(window))


def test_layers_that_attend_otherwise(save: Any) -> None:
    path = save("Qwen2").path
    configure(path, layer_types=["full_attention", "chunked_attention"])
    rejected(path, "layer_types", "chunked_attention")


def test_missing_tensor(save: Any) -> None:
    path = save().path
    rewrite(path, lambda tensors: tensors.pop(Q_PROJ))
    rejected(path, "lacks", Q_PROJ)


def test_unexpected_tensors(save: Any) -> None:
    path = save().path
    rewrite(path, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(5)}))
    rejected(path, "unexpected", "extra.0", "and 2 more")


@pytest.mark.parametrize("tensor", [torch.zeros(32, 31), torch.zeros(32 * 32), torch.zeros(1, 32, 32)])
def test_wrong_shape(tensor: torch.Tensor, save: Any) -> None:
    path = save().path
    rewrite(path, lambda tensors: tensors.update({Q_PROJ: tensor}))
    rejected(path, Q_PROJ, str(list(tensor.shape)), "[32, 32]")


def test_a_config_of_other_sizes_names_a_tensor(save: Any) -> None:
    path = save().path
    configure(path, intermediate_size=45)
    rejected(path, "mlp.", "45")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_tensors_that_are_not_plain_floats(dtype: torch.dtype, save: Any) -> None:
    path = save().path
    rewrite(path, lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 32).to(dtype)}))
    rejected(path, Q_PROJ)


def test_a_redundant_head_of_tied_embeddings_is_ignored(save: Any) -> None:
    path = save(tie_word_embeddings=True).path
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 32)}))
    load_model(str(path))


def test_only_pickled_weights(save: Any) -> None:
    path = save().path
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    rejected(path, "pickled")


def test_no_weights_at_all(save: Any) -> None:
    path = save().path
    (path / "model.safetensors").unlink()
    rejected(path, "model.safetensors")


def test_truncated_weights(save: Any) -> None:
    path = save().path
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    rejected(path, "model.safetensors", "cannot be read")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', "{}", '{"weight_map": {"a": 1}}'])
def test_broken_index(index: str, save: Any) -> None:
    path = save().path
    (path / "model.safetensors.index.json").write_text(index)
    rejected(path, "model.safetensors.index.json")


def test_missing_shard(save: Any) -> None:
    path = save(shard_size="8KB").path
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    rejected(path, shard.name, "missing")


def test_a_shard_that_lacks_what_the_index_promises(save: Any) -> None:
    path = save(shard_size="8KB").path
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = path / index["weight_map"][Q_PROJ]
    tensors = load_file(shard)
    del tensors[Q_PROJ]
    save_file(tensors, shard)
    rejected(path, shard.name, Q_PROJ)


def test_broken_generation_config(save: Any) -> None:
    path = save().path
    (path / "generation_config.json").write_text("[]")
    rejected(path, "generation_config.json")


@pytest.mark.parametrize(
    ("dtype", "declared", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("auto", torch.bfloat16, "cuda", torch.bfloat16),
        ("auto", "float16", "cuda", torch.float16),
        ("auto", None, "cuda", torch.float32),
        ("float64", torch.bfloat16, "cuda", torch.float64),
    ],
)
def test_dtype(dtype: Any, declared: Any, device: str, expected: torch.dtype) -> None:
    class Config:
        pass

    config = Config()
    config.dtype = declared  # type: ignore[attr-defined]
    assert resolve_dtype(dtype, config, torch.device(device)) == expected


def test_a_declared_dtype_that_is_not_supported() -> None:
    class Config:
        dtype = torch.float8_e4m3fn

    with pytest.raises(ModelLoadError, match="float8"):
        resolve_dtype("auto", Config(), torch.device("cuda"))
