"""`specserve bench serve` and its siblings, as users call them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from serverkit.fake_openai import Body, FakeOpenAI
from serverkit.processes import kit_environment
from specserve.bench.records import Comparison
from specserve.bench.trace import read_trace
from specserve.cli import bench_kernels
from specserve.cli.main import main, make_parser
from specserve.config import DEMO_ROOT

DEMO = str(DEMO_ROOT / "target")
SMALL = ("--num-prompts", "6", "--input-len", "4", "--output-len", "3")


def bench(server: FakeOpenAI, *flags: str) -> int:
    return main(["bench", "serve", "--base-url", server.url, *flags])


def last_line(path: Path) -> Any:
    return json.loads(path.read_text().splitlines()[-1])


def test_serve_prints_the_table_and_adds_a_line_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, slos = tmp_path / "new" / "results.jsonl", ("--goodput", "ttft:60000", "e2el:60000")
    with FakeOpenAI(root=DEMO, adapters=("a", "b")) as server:
        for detailed in ("--no-save-detailed", "--save-detailed"):
            flags = ("--result-filename", str(path), "--lora-modules", "all", "--lora-assignment", "round-robin")
            assert bench(server, *SMALL, *slos, *flags, "--max-concurrency", "2", "--num-warmups", "1", detailed) == 0
    shown = capsys.readouterr().out
    assert "Serving Benchmark Result" in shown and "Median TTFT (ms):" in shown and "Request goodput" in shown
    assert len(server.bodies) == 2 * 7
    assert [body["lora"] for body in server.bodies[1:7]] == ["a", "b"] * 3
    lines = [msgspec.json.decode(line, type=Comparison) for line in path.read_bytes().splitlines()]
    assert [len(line.runs[0].requests) for line in lines] == [0, 6]
    assert lines[1].runs[0].load == {"concurrency": 2}
    assert (lines[1].facts["metrics"]["completed"], lines[1].facts["metrics"]["total_output_tokens"]) == (6, 18)
    assert lines[1].facts["metrics"]["request_goodput"] > 0
    assert lines[1].variants[0].url == server.url


def test_percentiles_and_what_is_told_of_are_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    flags = ("--metric-percentiles", "95,25,99.9", "--percentile-metrics", "ttft,e2el", "--metadata", "run=3", "of=a=b")
    with FakeOpenAI(root=DEMO) as server:
        assert bench(server, *SMALL, "--result-filename", str(path), "--save-detailed", *flags) == 0
    shown = [line.split(" (ms):")[0] for line in capsys.readouterr().out.splitlines() if " (ms):" in line]
    assert shown == [
        f"{kind} {name}" for name in ("TTFT", "E2EL") for kind in ("Mean", "Median", "P25", "P95", "P99.9")
    ]
    facts = last_line(path)["facts"]
    assert facts["metadata"] == {"run": "3", "of": "a=b"}
    times = {name for name in facts["metrics"] if name.endswith("_ms")}
    kinds = ("mean", "median", "std", "p25", "p95", "p99.9")
    assert times == {f"{kind}_{name}_ms" for name in ("ttft", "e2el") for kind in kinds}
    records = msgspec.convert(last_line(path), Comparison).runs[0].requests
    e2el = [1000 * (record.end - record.sent) for record in records]
    assert facts["metrics"]["p95_e2el_ms"] == pytest.approx(float(np.percentile(e2el, 95)))


@pytest.mark.parametrize(
    "flag", [("--metric-percentiles", "0,50"), ("--percentile-metrics", "ttft,x"), ("--metadata", "x")]
)
def test_what_is_told_of_is_checked(flag: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["bench", "serve", *flag])
    assert f"argument {flag[0]}: '{flag[1]}' is not" in capsys.readouterr().err


def test_a_saved_trace_is_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with FakeOpenAI(root=DEMO) as server:
        assert bench(server, *SMALL, "--seeded", "--temperature", "0", "--save-trace", str(path)) == 0
        first = list(server.bodies)
        assert bench(server, "--trace", str(path)) == 0
    assert sorted(first, key=str) == sorted(server.bodies[6:], key=str)
    assert len(read_trace(path)) == 6


@pytest.mark.parametrize(("owner", "flags"), [("tgi", ()), ("vllm", ("--backend", "openai-chat"))])
def test_prompts_are_text_where_ids_are_not_taken(owner: str, flags: tuple[str, ...]) -> None:
    with FakeOpenAI(owner=owner, root=DEMO) as server:
        assert bench(server, *SMALL, *flags) == 0
    prompts = [body["messages"][0]["content"] if flags else body["prompt"] for body in server.bodies]
    assert all(isinstance(prompt, str) and prompt for prompt in prompts)


def test_some_failures_are_told_and_all_of_them_fail_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def some(body: Body) -> tuple[int, str] | None:
        return (429, "The queue is full.") if body["seed"] % 2 else None

    with FakeOpenAI(root=DEMO, refuse=some) as server:
        assert bench(server, *SMALL, "--seeded") == 0
    failed = sum(body["seed"] % 2 for body in server.bodies)
    captured = capsys.readouterr()
    assert f"{failed} of 6 requests failed: 429: The queue is full." in captured.err and 0 < failed < 6
    assert f"Successful requests:                     {6 - failed}" in captured.out
    with FakeOpenAI(root=DEMO, refuse=lambda body: (500, "no")) as server:
        assert bench(server, *SMALL) == 1
        assert bench(server, *SMALL, "--num-warmups", "1") == 2


def test_a_server_that_dies_leaves_the_figures_of_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    with FakeOpenAI(root=DEMO, gap=0.02) as server:

        def kill() -> None:
            while len(server.bodies) < 8:
                time.sleep(0.01)
            server.die()

        killer = threading.Thread(target=kill)
        killer.start()
        flags = ("--num-prompts", "500", "--input-len", "2", "--output-len", "3", "--request-rate", "20")
        status = bench(server, *flags, "--result-filename", str(path), "--save-detailed")
        killer.join()
    assert status == 1
    run = last_line(path)["runs"][0]
    assert run["complete"] is False
    assert 0 < sum("error" not in request for request in run["requests"]) < 500
    captured = capsys.readouterr()
    assert "takes no connections any more" in captured.err and "Successful requests" in captured.out


def test_an_interrupt_keeps_what_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    dataset = tmp_path / "own.jsonl"
    lengths = [2, 2, 2, 100_000, 100_000]
    dataset.write_text("\n".join(json.dumps({"prompt": "p", "output_len": length}) for length in lengths))
    with FakeOpenAI(gap=0.005) as server:
        command = [sys.executable, "-P", "-m", "specserve.cli.main", "bench", "serve", "--base-url", server.url]
        flags = ["--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", "5", "--disable-shuffle"]
        more = ["--max-concurrency", "1", "--result-filename", str(path)]
        process = subprocess.Popen(
            [*command, *flags, *more], env=kit_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(server.bodies) < 4 and process.poll() is None:  # one at a time: three have ended then
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted. 3 of 5 requests had ended; the figures are theirs." in err
    assert "Successful requests:                     3" in out
    assert last_line(path)["facts"]["metrics"]["completed"] == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lora-modules", "nobody"), "The server lists no adapter 'nobody', but a"),
        (("--dataset-name", "custom"), "--dataset-path is needed"),
        (("--dataset-name", "custom", "--dataset-path", "MESSAGES"), "use --endpoint /v1/chat/completions"),
        (("--tokenizer", "/nowhere/at/all"), "--tokenizer"),
        (("--goodput", "speed:3"), "'speed:3' is not NAME:MILLISECONDS"),
        (("--burstiness", "0"), "--burstiness must be positive"),
        (("--result-filename", "/dev/null/rows.jsonl"), "/dev/null/rows.jsonl cannot be written: "),
        (("--save-trace", "/dev/null/trace.jsonl"), "/dev/null/trace.jsonl cannot be written: "),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = tmp_path / "messages.jsonl"
    messages.write_text('{"messages": []}')
    with FakeOpenAI(root=DEMO, adapters=("a",)) as server:
        assert bench(server, *(str(messages) if flag == "MESSAGES" else flag for flag in flags)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not server.bodies


def test_a_url_without_its_scheme_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "127.0.0.1:8000"]) == 2
    assert capsys.readouterr().err == "specserve: '127.0.0.1:8000' is no URL of a server: http://HOST:PORT.\n"


def test_no_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI() as server:
        pass
    assert bench(server) == 2
    assert "No server answers at" in capsys.readouterr().err


def test_vllms_flags_are_understood() -> None:
    flags = (
        "--backend vllm --base-url http://x --model m --tokenizer t --dataset-name random --random-input-len 10 "
        "--random-output-len 20 --random-range-ratio 0.1 --random-prefix-len 0 --num-prompts 3 --request-rate inf "
        "--burstiness 0.5 --max-concurrency 4 --ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 4 "
        "--goodput ttft:100 tpot:20 --ignore-eos --save-result --save-detailed --result-dir d --result-filename f "
        "--label l --lora-modules a b --lora-assignment round-robin --seed 3 --temperature 0 --top-k -1 "
        "--num-warmups 0 --percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 25,50,99 --metadata a=b "
        "--disable-tqdm"
    )
    args = make_parser().parse_args(["bench", "serve", *flags.split()])
    assert (args.input_len, args.output_len, args.lora_modules, args.top_k) == (10, 20, ["a", "b"], -1)


def test_kernels_need_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = make_parser().parse_args(["bench", "kernels", "--only", "norm"])
    assert bench_kernels.run(args, root=tmp_path) == 2
    assert "in a checkout of the repository" in capsys.readouterr().err


@pytest.mark.slow
def test_offline_with_the_bundled_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    common = ("--input-len", "8", "--output-len", "4", "--lora-modules", "all", "--temperature", "0")
    assert main(["bench", "throughput", *common, "--num-prompts", "3", "--output-json", str(path)]) == 0
    metrics = last_line(path)["metrics"]
    assert (metrics["num_requests"], metrics["total_num_tokens"]) == (3, 3 * 12)
    made = {"device": "cpu", "dtype": "float32", "weights": "float32", "draft_weights": "float32"}
    assert last_line(path)["made"] == made
    assert metrics["output_tokens_per_second"] == pytest.approx(12 / metrics["elapsed_time"])
    times = ("--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1", "--output-json", str(path))
    assert main(["bench", "latency", *common, *times]) == 0
    metrics = last_line(path)["metrics"]
    assert len(metrics["latencies"]) == 3
    assert metrics["avg_latency"] == pytest.approx(sum(metrics["latencies"]) / 3)
    shown = capsys.readouterr().out
    assert "Throughput: " in shown and "50% percentile latency: " in shown
    assert main(["bench", "throughput", "--lora-modules", "nobody"]) == 2
    assert main(["bench", "latency", "--extra-body", '{"nothing": 1}']) == 2
