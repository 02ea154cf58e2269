"""Every metric, declared once, on a registry that is passed in. Words are vLLM's where they fit.

A *request* is one input of a call. Labels are bounded: model, endpoint, status, reason, type of error, phase.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections.abc import Iterator
from typing import Protocol

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
CALLS = ("generate", "encode", "classify", "score", "step", "align", "allocate", "iteration")

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


class Families:
    """The metrics of a process, on one registry. Each of its models has its own numbers in them: `of`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._models: dict[str, Metrics] = {}
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.connections = Gauge("transduce_connections", "Connections that are open.", registry=registry)
        self.connections_held = Gauge(
            "transduce_connections_held",
            "Connections that were refused again and are not read before their turn.",
            registry=registry,
        )
        self.large_answer_bytes = Gauge(
            "transduce_large_answer_bytes",
            "Bytes that large answers may come to or have, from the work for them until they are taken.",
            registry=registry,
        )
        self.connection_troubles = Counter(
            "transduce_connection_troubles",
            "Connections that were ended, or whose client left without its answer, by why.",
            ("reason",),
            registry=registry,
        )
        self.ready = self._gauge("ready", "1 while the model takes requests, else 0.")
        self.model_info = self._gauge("model_info", "1 for the version of the model that is served.", "version")
        self.model_loads = self._counter("model_loads", "Versions that were loaded, by what came of it.", "outcome")
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
        self.call_failures = self._counter(
            "model_call_failures", "Calls of the model that raised, or gave what is no number, by what for.", "call"
        )
        self.state_growths = self._counter("state_growths", "Times that a larger capacity made the state be copied.")
        self.requests = self._counter(
            "requests", "Requests accepted that came to an end, by how.", "endpoint", "finish_reason"
        )
        self.failures = self._counter(
            "request_failures", "Requests answered with an error, refused ones included, by its type.", "type"
        )
        self.http = self._counter("http_requests", "HTTP requests answered.", "endpoint", "status")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _LATENCY
        )
        self.inter_token_latency = WeightedHistogram(
            "transduce_inter_token_latency_seconds", "Between two tokens of a request.", _STEP
        )
        registry.register(self.inter_token_latency)
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From submission to the end of a request.", _LATENCY
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "From submission to leaving the line.", _LATENCY
        )
        self.iteration = self._histogram("iteration_seconds", "Time of an iteration's phases.", _PHASE, "phase")
        self.batch_rows = WeightedHistogram("transduce_batch_rows", "Rows of a decoder step.", _ROWS)
        registry.register(self.batch_rows)
        self.batch_padding_ratio = self._histogram(
            "batch_padding_ratio", "Share of an encoder call's tokens that is padding.", _RATIO
        )

    def of(self, model_name: str) -> Metrics:
        """The numbers of one model, whatever its version."""
        if model_name not in self._models:
            self._models[model_name] = Metrics(self, model_name)
        return self._models[model_name]

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"transduce_{name}", text, ("model_name", *labels), registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"transduce_{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"transduce_{name}", text, ("model_name", *labels), buckets=buckets, registry=self.registry)


class Watched(Protocol):
    """An engine, as far as gauges look at it when they are asked for."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""

    @property
    def line(self) -> tuple[int, int]:
        """How many sequences wait, of how many tokens."""


class Metrics:
    """The metrics of one model. Safe to write from several threads: gauges are told changes, not levels.

    While one version takes another's place both engines write here, and what waits is the sum of both.
    """

    def __init__(self, families: Families, model_name: str) -> None:
        self.registry = families.registry
        self.model_name = model_name
        self.families = families
        self._engines: list[Watched] = []
        self._version = ""
        families.ready.labels(model_name).set_function(lambda: float(any(engine.ready for engine in self._engines)))
        families.num_requests_waiting.labels(model_name).set_function(
            lambda: float(sum(engine.line[0] for engine in self._engines))
        )
        families.num_tokens_waiting.labels(model_name).set_function(
            lambda: float(sum(engine.line[1] for engine in self._engines))
        )
        self.num_requests_running = families.num_requests_running.labels(model_name)
        self.rows_in_use = families.rows_in_use.labels(model_name)
        self.rows_capacity = families.rows_capacity.labels(model_name)
        self.state_bytes = families.state_bytes.labels(model_name)
        self.state_bytes_limit = families.state_bytes_limit.labels(model_name)
        self.source_tokens = families.source_tokens.labels(model_name)
        self.generated_tokens = families.generated_tokens.labels(model_name)
        self.padding_tokens = families.padding_tokens.labels(model_name)
        self.state_growths = families.state_growths.labels(model_name)
        self.time_to_first_token = families.time_to_first_token.labels(model_name)
        self.inter_token_latency = families.inter_token_latency.labels(model_name)
        self.e2e_request_latency = families.e2e_request_latency.labels(model_name)
        self.request_queue_time = families.request_queue_time.labels(model_name)
        self.iteration = {phase: families.iteration.labels(model_name, phase) for phase in PHASES}
        for call in CALLS:  # from the first scrape on: an increase from nothing is none
            families.call_failures.labels(model_name, call)
        # Looking up a counter by its labels takes longer than counting.
        self._failures = functools.cache(functools.partial(families.failures.labels, model_name))
        self._http = functools.cache(functools.partial(families.http.labels, model_name))
        self.batch_rows = families.batch_rows.labels(model_name)
        self.batch_padding_ratio = families.batch_padding_ratio.labels(model_name)

    def follow(self, engine: Watched) -> None:
        """Look at this engine from now on."""
        self._engines.append(engine)

    def leave(self, engine: Watched) -> None:
        """And no longer at this one."""
        self._engines = [other for other in self._engines if other is not engine]

    def serve_version(self, version: str) -> None:
        """This is the version that is served now."""
        if self._version != version and self._version:
            self.families.model_info.remove(self.model_name, self._version)
        self._version = version
        self.families.model_info.labels(self.model_name, version).set(1)

    def count_load(self, outcome: str) -> None:
        """A version was loaded and is `served`, or it was `refused`."""
        self.families.model_loads.labels(self.model_name, outcome).inc()

    def count_finished(self, endpoint: str, finish_reason: str) -> None:
        """An accepted request came to an end."""
        self.families.requests.labels(self.model_name, endpoint, finish_reason).inc()

    def count_call_failure(self, call: str) -> None:
        """A call of the model failed: one of CALLS."""
        self.families.call_failures.labels(self.model_name, call).inc()

    def count_failure(self, error_type: str, requests: int = 1) -> None:
        """Requests were answered with an error. Whoever answers counts: the HTTP layer, not the engine."""
        self._failures(error_type).inc(requests)

    def count_http(self, endpoint: str, status: int) -> None:
        """An HTTP request was answered. `endpoint` is a route of ours, never a path that a client made up."""
        self._http(endpoint, status).inc()


class WeightedHistogram(Collector):
    """A histogram by model that takes n equal observations at once: the rows of a step share their latency. Count and
    sum are of one moment; the library's may be some steps apart, if a thread goes on while the page is made.
    """

    def __init__(self, name: str, text: str, buckets: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, buckets
        self._children: dict[str, Weights] = {}

    def labels(self, model_name: str) -> Weights:
        """The observations of one model."""
        return self._children.setdefault(model_name, Weights(self._bounds))

    def describe(self) -> Iterator[Metric]:
        """The name, for the registry to refuse another of it."""
        yield HistogramMetricFamily(self._name, self._text, labels=("model_name",))

    def collect(self) -> Iterator[Metric]:
        """Cumulative buckets, as the exposition format wants them."""
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name",))
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for model_name, weights in list(self._children.items()):
            counts, total = weights.read()
            family.add_metric([model_name], list(zip(bounds, counts, strict=True)), total)
        yield family


class Weights:
    """The observations of one model. Thread-safe."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` that many times."""
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def read(self) -> tuple[list[float], float]:
        """The cumulative counts, and the sum."""
        with self._lock:
            return list(map(float, itertools.accumulate(self._counts))), self._sum
