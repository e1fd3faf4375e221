"""/metrics: the names that dashboards rely on, and adapters' labels, bounded."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from serverkit.processes import Server
from specserve.core.messages import AdapterInfo
from specserve.server.adapter_metrics import MAX_ADAPTER_LABELS, adapter_metrics

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
