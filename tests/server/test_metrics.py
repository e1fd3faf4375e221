"""/metrics: the names that dashboards rely on, and adapters' labels, bounded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from serverkit.processes import Server, wait_until
from specserve.core.messages import AdapterInfo, AdapterTierStats
from specserve.server.adapter_metrics import MAX_ADAPTER_LABELS, adapter_metrics, tier_metrics

# As vLLM exposes them; prometheus-client adds _total to counters.
HISTOGRAMS = {
    *("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    "request_inference_time_seconds",
}
COUNTERS = {
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"),
    *("request_success", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    *("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos"),
}
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info"}


def scrape(server: Server) -> dict[tuple[str, str], float]:
    """(sample name, its labels without model_name) → value."""
    _, text = server.request("GET", "/metrics")
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "model_name")
            samples[sample.name, labels] = sample.value
    return samples


def test_names_and_types(scripted_server: Server) -> None:
    scripted_server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3})
    _, text = scripted_server.request("GET", "/metrics")
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    for names, kind in ((HISTOGRAMS, "histogram"), (COUNTERS, "counter"), (GAUGES, "gauge")):
        for name in names:
            assert types[f"vllm:{name}"] == kind, name
    for sample in (
        "vllm:prompt_tokens_total{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:kv_cache_usage_perc{",
    ):
        assert f"\n{sample}" in text
    assert 'model_name="base"' in text


def test_choice_of_drafts_is_shown(scripted_server: Server) -> None:
    samples = scrape(scripted_server)
    per_position = {
        name: [samples[f"{name}_per_pos_total", f"position={place}"] for place in (0, 1)]
        for name in ("specserve:drafted", "vllm:spec_decode_num_accepted_tokens")
    }
    assert list(per_position.values()) == [[5, 2], [3, 1]]
    assert samples["specserve:draft_length", ""] == 1.5
    assert samples["specserve:step_cost_ratio", ""] == 1.25
    assert samples["specserve:probed_rows_total", ""] == 7
    assert samples["specserve:probe_seconds_total", ""] == 0.5


def test_requests_are_counted(scripted_server: Server) -> None:
    before = scrape(scripted_server)
    for _ in range(3):
        scripted_server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3, "model": "one"})
    scripted_server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 9, "temperature": 0, "stop": "a"})
    after = scrape(scripted_server)

    def grown(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert grown("vllm:request_success_total", "finished_reason=length") == 3
    assert grown("vllm:request_success_total", "finished_reason=stop") == 1
    assert grown("vllm:time_to_first_token_seconds_count") == 4
    assert grown("vllm:e2e_request_latency_seconds_count") == 4
    assert grown("vllm:request_queue_time_seconds_count") == 4
    assert grown("vllm:request_prefill_time_seconds_count") == 4
    # 3 tokens come in 2 steps: one gap each.
    assert grown("vllm:inter_token_latency_seconds_count") == 3
    assert grown("specserve:adapter_requests_total", "adapter=one") == 3
    assert after["specserve:adapter_tier", "adapter=one"] == 1


def test_tiers_of_adapters_and_one_that_is_unloaded(scripted_server: Server, tiny: Path) -> None:
    before = scrape(scripted_server)
    path = str(tiny / "adapters" / "two")
    scripted_server.request("POST", "/v1/adapters", {"name": "short-lived", "path": path})
    wait_until(lambda: ("specserve:adapter_tier", "adapter=short-lived") in scrape(scripted_server), "it is told of")
    held = scrape(scripted_server)
    assert held["specserve:lora_host_bytes", ""] == before["specserve:lora_host_bytes", ""] + 1000
    assert held["specserve:lora_host_bytes_max", ""] == 10**6
    assert held["specserve:lora_slots", ""] == 8

    scripted_server.request("DELETE", "/v1/adapters/short-lived")
    wait_until(lambda: scrape(scripted_server).keys() == before.keys(), "no series of it is left")
    assert scrape(scripted_server)["specserve:lora_host_bytes", ""] == before["specserve:lora_host_bytes", ""]
    assert ("specserve:adapter_tier", "adapter=one") in before  # although it has long not changed


def test_tier_metrics() -> None:
    stats = AdapterTierStats(
        host_bytes=5, max_host_bytes=9, slots=8, slots_used=3, reads=4, read_seconds=0.5, loads=6, load_seconds=0.25,
        evictions_host=1, evictions_device=2,
    )  # fmt: skip
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in tier_metrics(stats)
        for sample in family.samples
    }
    assert samples == {
        ("specserve:lora_host_bytes",): 5, ("specserve:lora_host_bytes_max",): 9, ("specserve:lora_slots",): 8,
        ("specserve:lora_slots_used",): 3, ("specserve:lora_reads_total",): 4,
        ("specserve:lora_read_seconds_total",): 0.5, ("specserve:lora_loads_total",): 6,
        ("specserve:lora_load_seconds_total",): 0.25, ("specserve:lora_evictions_total", "host"): 1,
        ("specserve:lora_evictions_total", "device"): 2,
    }  # fmt: skip


def test_adapter_labels_are_bounded() -> None:
    infos = [
        AdapterInfo(
            name=f"a{number}", path="", version="", tier="device", requests=number, tokens=2 * number, drafted=1
        )
        for number in range(MAX_ADAPTER_LABELS + 50)
    ]
    labels: Counter[str] = Counter()
    for family in adapter_metrics(infos):
        samples = {sample.labels["adapter"]: sample.value for sample in family.samples}
        labels.update(samples.keys())
        assert "a0" not in samples
        assert "a149" in samples
        if family.name == "specserve:adapter_tokens":
            assert sum(samples.values()) == sum(info.tokens for info in infos)
            assert samples["other"] == 2 * sum(range(50))
    assert len(labels) == MAX_ADAPTER_LABELS + 1
