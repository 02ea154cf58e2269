"""The metrics are those of the contract, under their names."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Families, WeightedHistogram
from tests.service.fakes import make_metrics, sample

CONTRACT = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "rows_in_use": "gauge",
    "rows_capacity": "gauge",
    "source_tokens": "counter",
    "generated_tokens": "counter",
    "padding_tokens": "counter",
    "requests": "counter",
    "request_failures": "counter",
    "http_requests": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "iteration_seconds": "histogram",
    "batch_rows": "histogram",
    "batch_padding_ratio": "histogram",
}


def test_every_metric_of_the_contract_is_declared_with_a_help_text() -> None:
    """On the registry that was passed in, with the process's own beside them."""
    families = {family.name: family for family in make_metrics().registry.collect()}
    for name, kind in CONTRACT.items():
        assert families[f"transduce_{name}"].type == kind
        assert families[f"transduce_{name}"].documentation.endswith(".")
    assert "process_resident_memory_bytes" in families


def test_two_models_of_one_registry_are_a_mistake_that_is_seen() -> None:
    """Each metric is declared once."""
    metrics = make_metrics()
    with pytest.raises(ValueError, match="Duplicated"):
        Families(metrics.registry)


def test_labels_are_counted_apart() -> None:
    """Endpoint, reason, type and status."""
    metrics = make_metrics()
    metrics.count_finished("generate", "stop")
    metrics.count_finished("encode", "stop")
    metrics.count_failure("queue_full", 3)
    metrics.count_http("/v1/generate", 200)
    assert sample(metrics, "requests_total", endpoint="encode", finish_reason="stop") == 1
    assert sample(metrics, "request_failures_total", type="queue_full") == 3
    assert sample(metrics, "http_requests_total", endpoint="/v1/generate", status="200") == 1


def test_a_weighted_observation_is_that_many_plain_ones() -> None:
    """Buckets are cumulative, the bound belongs to its bucket, and the text can be read back."""
    metrics = make_metrics()
    histogram = WeightedHistogram("transduce_example_seconds", "Example.", (0.1, 1.0))
    metrics.registry.register(histogram)
    for value, times in ((0.1, 3), (0.5, 2), (7.0, 1)):
        histogram.labels("fake").observe(value, times)
    text = generate_latest(metrics.registry).decode()
    (family,) = (f for f in text_string_to_metric_families(text) if f.name == "transduce_example_seconds")
    values = {(s.name.removeprefix("transduce_example_seconds"), s.labels.get("le")): s.value for s in family.samples}
    assert values == {
        ("_bucket", "0.1"): 3,
        ("_bucket", "1.0"): 5,
        ("_bucket", "+Inf"): 6,
        ("_count", None): 6,
        ("_sum", None): pytest.approx(8.3),
    }


def test_a_page_has_the_count_and_the_sum_of_steps_of_one_moment() -> None:
    """However often a thread counts while it is read."""
    registry = CollectorRegistry()
    rows = Families(registry).of("tiny").batch_rows
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            rows.observe(1)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(100):
            family = next(family for family in registry.collect() if family.name == "transduce_batch_rows")
            values = {sample.name.removeprefix("transduce_batch_rows_"): sample.value for sample in family.samples}
            assert values["sum"] == values["count"]
    finally:
        over.set()
        worker.join()
