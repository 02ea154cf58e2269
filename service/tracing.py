"""Traces: one of each request for a model, by OpenTelemetry, where a place to send them is configured.

A request's span has the caller's for a parent (W3C Trace Context). Below it stand `tokenise` (from the body's last byte
to the engine's door) and, for each input, `queue`, `encode` and `decode`. The engine's threads know nothing of spans:
those below are made when the request is over, with the times that it left behind. Nothing of a text stands in one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service import __version__
from service.errors import SettingsError
from service.trail import Step, Trail

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


def provider_for(endpoint: str) -> TracerProvider:
    """One that sends spans to `endpoint` by OTLP over HTTP, in batches, on a thread of its own.

    Sampling, limits, headers and the service's name follow OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, ...).
    Raises SettingsError if the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise SettingsError(
            "--traces-endpoint: OpenTelemetry is not installed; pip install 'transduce[otel]'"
        ) from None
    resource = Resource.create({"service.name": "transduce", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Begins and ends the spans of requests."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._tracer = provider.get_tracer("transduce", __version__)
        self._context = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> Span:
        """The span of a request that has just come."""
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        return self._tracer.start_span(method, self._context.extract(carrier), SpanKind.SERVER)

    def end(self, span: Span, trail: Trail, method: str, endpoint: str, status: int) -> None:
        """The request was answered. What it did in between becomes spans below its own."""
        span.update_name(f"{method} {endpoint}")
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": endpoint,
                "http.response.status_code": status,
                "transduce.request_id": trail.request_id,
                "transduce.inputs": trail.inputs,
                "transduce.source_tokens": trail.source_tokens,
                "transduce.generated_tokens": trail.generated_tokens,
            }
        )
        if trail.model is not None:
            span.set_attribute("transduce.model", trail.model)
        if trail.client:
            span.set_attribute("enduser.id", trail.client)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        if span.is_recording() and trail.submitted is not None:
            self._add_steps(span, trail, trail.submitted)
        span.end()

    def _add_steps(self, span: Span, trail: Trail, submitted: float) -> None:
        context = trace.set_span_in_context(span)
        offset = time.time() - time.monotonic()

        def add(name: str, began: float, ended: float, **attributes: int) -> None:
            start, end = (round((moment + offset) * 1e9) for moment in (began, ended))
            below = self._tracer.start_span(
                name, context, start_time=start, attributes={f"transduce.{key}": n for key, n in attributes.items()}
            )
            below.end(end)

        add("tokenise", trail.began if trail.read is None else trail.read, submitted, inputs=trail.inputs)
        for step in trail.steps:
            for name, began, ended in _phases(step):
                add(
                    name, submitted + began, submitted + ended,
                    input=step.index, source_tokens=step.source_tokens, generated_tokens=step.generated_tokens,
                )  # fmt: skip


def _phases(step: Step) -> list[tuple[str, float, float]]:
    """What an input went through, from when to when, in seconds since it was submitted."""
    timings = step.timings
    phases = [("queue", 0.0, timings.queued)]
    if step.kind != "generate" or timings.encoded is None:
        return [*phases, (step.kind, timings.queued, timings.total)]
    return [*phases, ("encode", timings.queued, timings.encoded), ("decode", timings.encoded, timings.total)]
