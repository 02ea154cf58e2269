"""Every metric, declared once, on a registry that is passed in. Words are vLLM's where they fit.

A *request* is one input of a call. Labels are bounded: model, endpoint, status, reason, type of error, phase.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

FINISH_REASONS = ("stop", "length", "timeout", "cancelled", "error")
PHASES = ("schedule", "encode", "step", "select")

_LATENCY = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)
_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_PHASE = (0.00005, 0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_RATIO = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The metrics of one model. Safe to write from several threads: gauges are told changes, not levels."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.registry = registry
        self.model_name = model_name
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.num_requests_running = self._gauge("num_requests_running", "Requests that are being worked on.")
        self.num_requests_waiting = self._gauge("num_requests_waiting", "Requests that wait in line.")
        self.num_tokens_waiting = self._gauge("num_tokens_waiting", "Tokens of the requests that wait in line.")
        self.rows_in_use = self._gauge("rows_in_use", "Rows of the decoder's batch that hold a sequence.")
        self.rows_capacity = self._gauge("rows_capacity", "Rows that the decoder's batch can hold.")
        self.state_bytes = self._gauge("state_bytes", "Memory of the decoder's state tensors now, in bytes.")
        self.state_bytes_limit = self._gauge("state_bytes_limit", "Memory that the state tensors can reach, in bytes.")
        self.source_tokens = self._counter("source_tokens", "Source tokens encoded, padding not counted.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated, end tokens included.")
        self.padding_tokens = self._counter("padding_tokens", "Source tokens encoded that were only padding.")
        self.ready = self._gauge("ready", "1 while the model takes requests, else 0.")
        self._call_failures = Counter(
            "transduce_model_call_failures", "Calls of the model that raised, or gave what is no number, by what for.",
            ("model_name", "call"), registry=registry,
        )  # fmt: skip
        self.state_growths = self._counter("state_growths", "Times that a larger capacity made the state be copied.")
        self._requests = Counter(
            "transduce_requests", "Requests accepted that came to an end, by how.",
            ("model_name", "endpoint", "finish_reason"), registry=registry,
        )  # fmt: skip
        self._failures = Counter(
            "transduce_request_failures", "Requests answered with an error, refused ones included, by its type.",
            ("model_name", "type"), registry=registry,
        )  # fmt: skip
        self._http = Counter(
            "transduce_http_requests",
            "HTTP requests answered.",
            ("model_name", "endpoint", "status"),
            registry=registry,
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From submission to the first token.",
            _LATENCY,
        )
        self.inter_token_latency = WeightedHistogram(
            "transduce_inter_token_latency_seconds",
            "Between two tokens of a request.",
            _STEP,
            model_name,
        )
        registry.register(self.inter_token_latency)
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds",
            "From submission to the end of a request.",
            _LATENCY,
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds",
            "From submission to leaving the line.",
            _LATENCY,
        )
        iteration = Histogram(
            "transduce_iteration_seconds", "Time of an iteration's phases.",
            ("model_name", "phase"), buckets=_PHASE, registry=registry,
        )  # fmt: skip
        self.iteration = {phase: iteration.labels(model_name, phase) for phase in PHASES}
        self.batch_rows = self._histogram("batch_rows", "Rows of a decoder step.", _ROWS)
        self.batch_padding_ratio = self._histogram(
            "batch_padding_ratio",
            "Share of an encoder call's tokens that is padding.",
            _RATIO,
        )

    def count_finished(self, endpoint: str, finish_reason: str) -> None:
        """An accepted request came to an end."""
        self._requests.labels(self.model_name, endpoint, finish_reason).inc()

    def count_call_failure(self, call: str) -> None:
        """A call of the model failed: for generate, encode, classify or score, or a step."""
        self._call_failures.labels(self.model_name, call).inc()

    def count_failure(self, error_type: str, requests: int = 1) -> None:
        """Requests were answered with an error. Whoever answers counts: the HTTP layer, not the engine."""
        self._failures.labels(self.model_name, error_type).inc(requests)

    def count_http(self, endpoint: str, status: int) -> None:
        """An HTTP request was answered. `endpoint` is a route of ours, never a path that a client made up."""
        self._http.labels(self.model_name, endpoint, str(status)).inc()

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"transduce_{name}", text, ("model_name",), registry=self.registry).labels(self.model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"transduce_{name}", text, ("model_name",), registry=self.registry).labels(self.model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(
            f"transduce_{name}",
            text,
            ("model_name",),
            buckets=buckets,
            registry=self.registry,
        )
        return family.labels(self.model_name)


class WeightedHistogram(Collector):
    """A histogram that takes n equal observations at once: the rows of a step share their latency."""

    def __init__(self, name: str, text: str, buckets: tuple[float, ...], model_name: str) -> None:
        self._name, self._text, self._model_name = name, text, model_name
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int) -> None:
        """Count `value` that many times."""
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def describe(self) -> Iterator[Metric]:
        """The name, for the registry to refuse another of it."""
        yield HistogramMetricFamily(self._name, self._text, labels=("model_name",))

    def collect(self) -> Iterator[Metric]:
        """Cumulative buckets, as the exposition format wants them."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, itertools.accumulate(self._counts)), strict=True))
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name",))
        family.add_metric([self._model_name], buckets, self._sum)
        yield family
