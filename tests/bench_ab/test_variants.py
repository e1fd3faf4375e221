"""Variants from flags, commands, URLs and files; the commands that they become."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from specserve.bench.adapter_loads import ranks_of
from specserve.bench.defaults import default_trace, plan_for
from specserve.bench.engines import complete_command, engine_of, model_of
from specserve.bench.options import TraceOptions
from specserve.bench.plan import AbOptions
from specserve.bench.variants import Variant, parse_variant, read_variants
from specserve.config import DEMO_ROOT
from specserve.core.errors import InvalidRequestError


def test_no_flags_serve_the_demo_without_its_draft() -> None:
    variant = parse_variant("A", "", "demo")
    assert variant.title == "no flags"
    assert variant.engine == "specserve"
    assert variant.command[:3] == ("specserve", "serve", str(DEMO_ROOT / "target"))
    assert f"sql={DEMO_ROOT / 'adapters' / 'sql'}" in variant.command
    assert not any("draft-model" in word for word in variant.command)


@pytest.mark.parametrize("flags", ["--draft-model demo", "--draft-model=demo"])
def test_the_demo_draft_is_named_demo(flags: str) -> None:
    variant = parse_variant("B", flags, "demo")
    assert flags.replace("demo", str(DEMO_ROOT / "draft")) in " ".join(variant.command)
    assert variant.title == flags


def test_flags_go_with_the_model_that_all_serve_or_with_their_own() -> None:
    assert parse_variant("A", "--max-loras 4", "some/model").command == (
        "specserve", "serve", "some/model", "--max-loras", "4",
    )  # fmt: skip
    own = parse_variant("A", "specserve serve other/model --max-loras 4", "some/model")
    assert own.command[:3] == ("specserve", "serve", "other/model")


def test_adapters_of_its_own_leave_the_demos_out() -> None:
    command = parse_variant("A", "--lora x=/x", "demo").command
    assert [word for word in command if "=" in word] == ["x=/x"]


def test_a_url_is_a_server_that_runs() -> None:
    variant = parse_variant("B", "http://127.0.0.1:9/", "demo")
    assert (variant.url, variant.command) == ("http://127.0.0.1:9", ())


def test_another_servers_command_tells_its_port() -> None:
    variant = parse_variant("B", f"{sys.executable} serve.py --port {{port}}", "demo")
    assert complete_command(variant.command, port=81, share=0.45, taken=0.0)[-2:] == ["--port", "81"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("A", "./serve", "{port}"),
        ("A", "vllm serve model", "'vllm' is not installed here"),
        ("A", "--lora 'x", "No closing quotation"),
        ("a b", "", "variant name"),
        ("A", "--api-key secret", "reports show a side's command"),
    ],
)
def test_what_cannot_be_started_is_refused(name: str, text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InvalidRequestError, match=said):
        parse_variant(name, text, "demo")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["vllm", "serve", "m"], "vllm"),
        (["/opt/v/bin/vllm", "serve", "m"], "vllm"),
        (["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"], "vllm"),
        (["python3", "-m", "sglang.launch_server", "--model-path", "m"], "sglang"),
        (["text-generation-launcher", "--model-id", "m"], "tgi"),
        (["transformers", "serve"], "transformers"),
        (["specserve", "serve"], "specserve"),
        (["./mine", "--model", "vllm"], None),
    ],
)
def test_known_servers(command: list[str], name: str | None) -> None:
    engine = engine_of(command)
    assert (engine.name if engine else None) == name


@pytest.mark.parametrize(
    ("command", "first", "second"),
    [
        # specserve counts what others hold of the device as taken, vLLM does not, SGLang sees what is free.
        ("specserve serve m", "--gpu-memory-utilization 0.45", "--gpu-memory-utilization 0.9"),
        ("vllm serve m", "--gpu-memory-utilization 0.45", "--gpu-memory-utilization 0.45"),
        ("sglang serve --model-path m", "--mem-fraction-static 0.45", "--mem-fraction-static 0.8182"),
        ("text-generation-launcher --model-id m", "--cuda-memory-fraction 0.45", "--cuda-memory-fraction 0.45"),
    ],
)
def test_two_servers_get_half_of_the_memory_each(command: str, first: str, second: str) -> None:
    for taken, flags in ((0.0, first), (0.45, second)):
        whole = complete_command(command.split(), port=5, share=0.45, taken=taken)
        assert " ".join(whole).endswith(f"--port 5 {flags}")


def test_a_share_of_ones_own_stays() -> None:
    words = ["specserve", "serve", "m", "--gpu-memory-utilization=0.3", "--port", "7"]
    whole = complete_command(words, port=5, share=0.45, taken=0.0)
    assert whole == [sys.executable, "-m", "specserve.cli.main", *words[1:]]


def test_a_file_of_variants(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(
        "model: some/model\n"
        "variants:\n"
        "  plain: ''\n"
        "  ngram: {run: --proposer ngram, title: with n-grams, environment: {OMP_NUM_THREADS: '1'}}\n"
        "  other: http://h:1\n"
    )
    plain, ngram, other = read_variants(str(path), "demo")
    assert plain.command == ("specserve", "serve", "some/model")
    assert (ngram.title, ngram.environment) == ("with n-grams", {"OMP_NUM_THREADS": "1"})
    assert ngram.command[3:] == ("--proposer", "ngram")
    assert other.url == "http://h:1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variants: {a: ''}", "two variants at least, not 1"),
        ("variants: {a: '', b: {flags: x}}", "unknown field `flags`"),
        ("variants: [a", "expected"),
        ("{}", "missing required field `variants`"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=said):
        read_variants(str(path), "demo")
    with pytest.raises(InvalidRequestError, match="No such file"):
        read_variants(str(tmp_path / "none.yaml"), "demo")


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("vllm serve m --port 3", "m"),
        ("vllm serve --model m", "m"),
        ("python -m sglang.launch_server --model-path=m", "m"),
        ("text-generation-launcher --model-id m", "m"),
        ("vllm serve", None),
        ("vllm serve --port 3", None),
        ("./mine m", None),
    ],
)
def test_what_a_command_serves(command: str, model: str | None) -> None:
    assert model_of(command.split()) == model


def test_the_demo_has_prompts_of_its_own_and_answers_are_greedy() -> None:
    demo = [parse_variant("A", "", "demo"), parse_variant("B", "--draft-model demo", "demo")]
    trace = default_trace(TraceOptions(), demo)
    assert (trace.dataset_name, trace.temperature) == ("custom", 0.0)
    plan = plan_for(demo, AbOptions(), trace, None, {})
    asked = [request for requests in plan.traces.values() for request in requests]
    assert {request.adapter for request in asked} == {None, "sql", "javascript", "docs"}
    assert {request.max_tokens for request in asked} == {48}
    assert default_trace(TraceOptions(input_len=9), demo).dataset_name == "random"
    others = [*demo, parse_variant("C", "specserve serve other/model", "demo")]
    assert default_trace(TraceOptions(temperature=0.5), others) == TraceOptions(temperature=0.5)


def test_ranks_are_those_of_the_folders_that_commands_name(tmp_path: Path) -> None:
    for name, config in {"a": '{"r": 8}', "b": '{"r": 64}', "broken": "{}"}.items():
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "adapter_config.json").write_text(config)
    (tmp_path / "all" / "notes.txt").touch()
    words = ("vllm", "serve", "m", "--lora-modules", f"x={tmp_path}/all/a", f"y={tmp_path}/all/b", "z=/nowhere")
    one = Variant("A", "", command=words)
    other = parse_variant("B", f"--lora-dir {tmp_path}/all --lora=c={tmp_path}/all/b", "other")
    assert ranks_of([one]) == {"x": 8, "y": 64}
    assert ranks_of([other]) == {"a": 8, "b": 64, "c": 64}
    assert ranks_of([parse_variant("C", "", "demo")]) == {"docs": 12, "javascript": 16, "sql": 8}
    assert ranks_of([parse_variant("D", "http://127.0.0.1:1", "demo")]) == {}


def test_who_takes_no_token_ids_is_asked_in_texts_and_so_are_all() -> None:
    demo = parse_variant("A", "", "demo")
    options, trace = AbOptions(concurrency=(1,), rounds=1), TraceOptions(input_len=8, output_len=4)
    ids = plan_for([demo, demo], options, trace, None, {})
    texts = plan_for([demo, Variant("B", "tgi", "tgi", ("x",))], options, trace, None, {})
    assert {type(request.prompt) for requests in ids.traces.values() for request in requests} == {list}
    assert {type(request.prompt) for requests in texts.traces.values() for request in requests} == {str}


def test_random_prompts_need_a_tokenizer_that_some_side_tells() -> None:
    unknown = [Variant(name, "?", command=("x", "{port}")) for name in "AB"]
    with pytest.raises(InvalidRequestError, match="by --tokenizer"):
        plan_for(unknown, AbOptions(), TraceOptions(), None, {})
