"""What an operator sees of a request: a line of the log, a header, a trace. Sizes and times, no text and no key."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import SettingsError
from service.logs import Words, set_up_logs
from service.models import Models
from service.tracing import Tracing, provider_for
from service.trail import KEPT, Trail
from tests.service.fake_engine import FakeEngine, fake_models
from tests.service.real_model import running

CANARY = "kanarienvogel"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def client(tiny_artifact: Path, exporter: InMemorySpanExporter) -> Iterator[TestClient]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    with running(tiny_artifact, max_rows=8) as model, TestClient(create_app(Models([model]), tracing)) as client:
        yield client


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    for span in exporter.get_finished_spans():
        assert CANARY not in span.to_json()


def lines(caplog: pytest.LogCaptureFixture) -> list[Words]:
    return [record.msg for record in caplog.records if isinstance(record.msg, Words)]


# ---- the log ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_sizes_and_times(client: TestClient, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    """Of the body, the inputs, the tokens; in line, in the engine and in all."""
    caplog.set_level(logging.INFO)
    body = json.dumps({"inputs": [f"{CANARY} one", "two"], "stream": stream})
    client.post("/v1/generate", content=body, headers={"X-Request-ID": "mine"})
    (line,) = lines(caplog)
    known = {
        "request_id": "mine", "method": "POST", "endpoint": "/v1/generate", "status": 200, "model": "tiny",
        "body_bytes": len(body), "inputs": 2,
    }  # fmt: skip
    assert known.items() <= line.items()
    assert line["source_tokens"] > 2
    assert line["generated_tokens"] > 2
    assert 0 <= line["queued_seconds"] <= line["engine_seconds"] <= line["seconds"]
    assert CANARY not in caplog.text


def test_a_refused_request_has_what_is_known(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of an engine that was not asked."""
    caplog.set_level(logging.INFO)
    client.post("/v1/generate", json={"inputs": CANARY, "model": "another"})
    (line,) = lines(caplog)
    assert line["status"] == 404
    assert not {"model", "source_tokens", "engine_seconds"} & set(line)
    assert CANARY not in caplog.text


def test_an_overloaded_server_does_not_drown_its_log(caplog: pytest.LogCaptureFixture) -> None:
    """Of what is refused for want of room a line a second, and their number; each counts in the metrics."""
    caplog.set_level(logging.INFO)
    with TestClient(create_app(fake_models(FakeEngine(room=0)))) as client:
        moment = [1000.0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("service.middleware.Trail", lambda request_id: Trail(request_id, began=moment[0]))
            for number in range(30):
                moment[0] = 1000.0 + number / 20
                assert client.post("/v1/generate", json={"inputs": CANARY}).status_code == 429
        refused = [line for line in client.get("/metrics").text.splitlines() if 'status="429"' in line]
    assert [line.get("further_requests") for line in lines(caplog)] == [None, 19, None]
    assert [line["status"] for line in lines(caplog)] == [429, 429, 429]
    assert 'endpoint="/v1/generate"' in refused[0]
    assert refused[0].endswith(" 30.0")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_is_text_or_an_object(capsys: pytest.CaptureFixture[str], form: Any) -> None:
    """The same names either way; an exception belongs to its line."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        set_up_logs("info", form)
        logger = logging.getLogger("transduce.example")
        logger.info(Words(request_id="a", status=200))
        logger.warning("the %s went wrong", "thing")
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("caught")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    written = capsys.readouterr().err
    if form == "text":
        assert re.match(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO transduce\.example request_id=a status=200\n", written
        )
        assert "Traceback" in written
        return
    first, second, third = map(json.loads, written.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {"level": "info", "logger": "transduce.example", "request_id": "a", "status": 200}
    assert second["message"] == "the thing went wrong"
    assert "ValueError: why" in third["exception"]


# ---- the header ----


@pytest.mark.parametrize(
    ("route", "more"),
    [("generate", {}), ("encode", {}), ("score", {"targets": "b"})],
)
def test_an_answer_says_where_its_time_went(client: TestClient, route: str, more: dict[str, str]) -> None:
    """Server-Timing, as browsers and proxies read it, in milliseconds."""
    response = client.post(f"/v1/{route}", json={"inputs": "a", **more})
    parts = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    prepare, queue, engine, total = (float(parts[name]) for name in ("prepare", "queue", "engine", "total"))
    assert 0 <= queue <= engine
    assert prepare >= 0
    assert prepare + engine <= total + 1


def test_what_the_engine_was_not_asked_says_nothing(client: TestClient) -> None:
    """Errors, other routes, and a stream, whose headers go out before anything is known."""
    assert "server-timing" not in client.get("/v1/models").headers
    assert "server-timing" not in client.post("/v1/generate", json={}).headers
    assert "server-timing" not in client.post("/v1/generate", json={"inputs": "a", "stream": True}).headers


# ---- traces ----


def test_a_trace_tells_the_way_of_a_request(client: TestClient, spans: InMemorySpanExporter) -> None:
    """Below the caller's span: request > tokenise, and for each input queue, encode, decode, one after the other."""
    caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    client.post("/v1/generate", json={"inputs": [CANARY, "two"]}, headers={"traceparent": caller})
    found = spans.get_finished_spans()
    by_name: dict[str, list[ReadableSpan]] = {}
    for span in found:
        by_name.setdefault(span.name, []).append(span)
    (request,) = by_name.pop("POST /v1/generate")
    assert {name: len(some) for name, some in by_name.items()} == {"tokenise": 1, "queue": 2, "encode": 2, "decode": 2}
    assert request.parent is not None
    assert request.parent.span_id == 0x00F067AA0BA902B7
    assert request.attributes is not None
    assert request.attributes["transduce.model"] == "tiny"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["transduce.generated_tokens"] == sum(
        (span.attributes or {})["transduce.generated_tokens"] for span in by_name["decode"]
    )
    for span in found:
        assert format(span.context.trace_id, "032x") == "4bf92f3577b34da6a3ce929d0e0e4736"
        if span is not request:
            assert span.parent == request.context
            assert request.start_time - 1e6 <= span.start_time <= span.end_time <= request.end_time + 1e6
    for number in (0, 1):
        queue, encode, decode = (
            next(span for span in by_name[name] if span.attributes["transduce.input"] == number)
            for name in ("queue", "encode", "decode")
        )
        assert queue.end_time == encode.start_time
        assert encode.end_time == decode.start_time


@pytest.mark.parametrize(("route", "more"), [("encode", {}), ("score", {"targets": "b"})])
def test_other_routes_have_their_own_step(
    client: TestClient, spans: InMemorySpanExporter, route: str, more: dict[str, str]
) -> None:
    """A queue, and one call of the model."""
    client.post(f"/v1/{route}", json={"inputs": CANARY, **more})
    assert [span.name for span in spans.get_finished_spans()] == ["tokenise", "queue", route, f"POST /v1/{route}"]


def test_a_trace_stays_small_and_knows_its_failures(client: TestClient, spans: InMemorySpanExporter) -> None:
    """However many inputs a call has; a refusal is a span alone; probes are none."""
    client.post("/v1/encode", json={"inputs": ["a"] * 100})
    assert len(spans.get_finished_spans()) == 2 + 2 * KEPT
    spans.clear()
    client.post("/v1/generate", json={"inputs": CANARY, "parameters": {"num_beams": 0}})
    client.get("/healthz")
    client.get("/metrics")
    (span,) = spans.get_finished_spans()
    assert span.attributes["http.response.status_code"] == 422
    assert span.status.is_unset


def test_the_log_and_the_trace_find_each_other(
    client: TestClient, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    """By the trace's id in the line, and the request's id in the span."""
    caplog.set_level(logging.INFO)
    client.post("/v1/encode", json={"inputs": "a"}, headers={"X-Request-ID": "mine"})
    (line,) = lines(caplog)
    request = spans.get_finished_spans()[-1]
    assert line["trace_id"] == format(request.context.trace_id, "032x")
    assert request.attributes["transduce.request_id"] == "mine"


def test_without_a_place_for_them_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it is loaded, and lines have no trace's id."""
    caplog.set_level(logging.INFO)
    with TestClient(create_app(fake_models())) as client:
        client.post("/v1/encode", json={"inputs": "a"})
    assert "trace_id" not in lines(caplog)[0]
    code = "import sys, service.app; print('service.tracing' in sys.modules, 'opentelemetry.sdk' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"


def test_without_its_packages_the_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"transduce\[otel\]"):
        provider_for("http://127.0.0.1:1/v1/traces")


def test_a_collector_is_sent_what_was_seen(tiny_artifact: Path) -> None:
    """The program itself, with the flag, and something that listens where a collector would."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    flags = ["--model", str(tiny_artifact), "--port", "0", "--traces-endpoint", endpoint, "--log-format", "json"]
    program = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", *flags], stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stderr is not None
        url = ""
        for text in program.stderr:
            message = json.loads(text).get("message", "")
            if found := re.search(r"listening on (\S+) ", message):
                url = found[1]
            if message == "ready":
                break
        assert httpx.post(f"{url}/v1/generate", json={"inputs": CANARY}).status_code == 200
        program.terminate()
        rest = program.stderr.read()
        assert program.wait(60) == 0
    finally:
        program.kill()
        program.wait()
        program.stderr.close()
        collector.shutdown()
        thread.join()
        collector.server_close()
    assert all(isinstance(json.loads(text), dict) for text in rest.splitlines())
    assert CANARY not in rest
    names = []
    for body in bodies:
        assert CANARY.encode() not in body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            assert any(attribute.value.string_value == "transduce" for attribute in resource.resource.attributes)
            names += [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/generate", "decode", "encode", "queue", "tokenise"]
