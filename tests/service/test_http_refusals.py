"""What is refused, with which status, in the one shape, and without repeating what was sent."""

import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from tests.service.fake_engine import FakeEngine, fake_models


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(engine, max_body_bytes=2**21)), raise_server_exceptions=True) as client:
        yield client


def refusal(response: Any, status: int, kind: str) -> str:
    """The message of an error response, whose shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    assert body["error"]["type"] == kind
    return str(body["error"]["message"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"inputs=hello",
        b'{"inputs": "a"',
        b'{"inputs": "a"} x',
        b"{'inputs': 'a'}",
        b'{"inputs": "\xff"}',
        '{"inputs": "a"}'.encode("utf-16"),
        b'{"inputs": "a\nb"}',
        b'{"inputs": NaN}',
        b'{"inputs": "a", "parameters": {"timeout": Infinity}}',
        b'{"inputs": "a", "inputs": "b"}',
        b'{"inputs": ' + b"9" * 5000 + b"}",
        b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs": ' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":' * 100_000,
        json.dumps({"inputs": "a", "parameters": dict.fromkeys(map(str, range(50_000)))}).encode(),
    ],
)
def test_what_is_no_json_is_400(client: TestClient, body: bytes) -> None:
    """Not JSON, not UTF-8, not numbers, a key twice, nested too deep, or with very many members."""
    refusal(client.post("/v1/generate", content=body), 400, "invalid_request")


@pytest.mark.parametrize("body", [b'{"inp', b'{"inputs": "a\nb"}', b'{"inputs": "a"'])
def test_where_it_is_no_json_is_said_once(client: TestClient, body: bytes) -> None:
    """Some of Python's messages end with "at" themselves."""
    message = refusal(client.post("/v1/generate", content=body), 400, "invalid_request")
    assert re.fullmatch(r"the body is not JSON: .+(?<! at) at character \d+", message), message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (3, ["body", "object"]),
        ([], ["body", "object"]),
        ({}, ["inputs", "required"]),
        ({"inputs": None}, ["inputs"]),
        ({"inputs": 3}, ["inputs", "string"]),
        ({"inputs": []}, ["inputs", "at least one"]),
        ({"inputs": ["a", "b", 3]}, ["inputs", "item 2"]),
        ({"inputs": ["a", ["b"]]}, ["inputs", "item 1"]),
        ({"inputs": "a", "text": "b"}, ["text", "unknown field"]),
        ({"inputs": "a", "stream": "yes"}, ["stream", "boolean"]),
        ({"inputs": "a", "stream": 1}, ["stream", "boolean"]),
        ({"inputs": "a", "model": 3}, ["model", "string"]),
        ({"inputs": "a", "parameters": []}, ["parameters", "object"]),
        ({"inputs": "a", "parameters": {"max_tokens": 3}}, ["parameters.max_tokens", "unknown field"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, ["parameters.max_new_tokens", "between 1 and 48"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": -(10**300)}}, ["parameters.max_new_tokens", "1 and 48"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": 49}}, ["parameters.max_new_tokens", "between 1 and 48"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": 10**300}}, ["parameters.max_new_tokens", "between 1 and 48"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": 2.5}}, ["parameters.max_new_tokens", "integer"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": True}}, ["parameters.max_new_tokens", "integer"]),
        ({"inputs": "a", "parameters": {"max_new_tokens": "5"}}, ["parameters.max_new_tokens", "integer"]),
        ({"inputs": "a", "parameters": {"timeout": 0}}, ["parameters.timeout", "between 0.001 and 86400"]),
        ({"inputs": "a", "parameters": {"timeout": -1}}, ["parameters.timeout", "between"]),
        ({"inputs": "a", "parameters": {"length_penalty": 1e9}}, ["parameters.length_penalty", "between -10 and 10"]),
        ({"inputs": "a", "parameters": {"num_beams": True}}, ["parameters.num_beams", "integer"]),
        ({"inputs": "a", "parameters": {"temperature": 0.7}}, ["parameters.temperature", "do_sample"]),
        ({"inputs": "a", "parameters": {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}}, ["and 2 more"]),
    ],
)
def test_a_wrong_field_is_422_and_named(client: TestClient, engine: FakeEngine, body: Any, words: list[str]) -> None:
    """The message has the field's path and what it must be; nothing reaches the engine."""
    message = refusal(client.post("/v1/generate", json=body), 422, "validation_failed")
    assert all(word in message for word in words), message
    assert engine.submitted == 0


def test_a_number_beyond_floats_is_out_of_range(client: TestClient) -> None:
    """1e999 is JSON; as a number it is infinite."""
    body = b'{"inputs": "a", "parameters": {"timeout": 1e999}}'
    assert "parameters.timeout" in refusal(client.post("/v1/generate", content=body), 422, "validation_failed")


def test_a_field_named_by_a_lone_surrogate_is_refused_in_utf8(client: TestClient) -> None:
    """The name comes back with U+FFFD."""
    response = client.post("/v1/generate", content=rb'{"inputs": "a", "\ud800": 1}')
    assert "\ufffd: unknown field" in refusal(response, 422, "validation_failed")


def test_a_text_that_is_too_long_is_413_with_limit_and_length(client: TestClient, engine: FakeEngine) -> None:
    """By tokens where they must be counted, by characters where those are already too many; one refuses the call."""
    message = refusal(client.post("/v1/generate", json={"inputs": ["a", "é" * 40]}), 413, "too_large")
    assert "inputs[1] has 81 tokens" in message
    assert "limit is 64" in message
    message = refusal(client.post("/v1/generate", json={"inputs": "a" * 1_000_000}), 413, "too_large")
    assert "1,000,000 characters" in message
    assert engine.submitted == 0


def test_too_many_inputs_are_413(client: TestClient) -> None:
    """With the limit in the message."""
    message = refusal(client.post("/v1/generate", json={"inputs": ["a"] * 10_000}), 413, "too_large")
    assert "10,000 inputs" in message
    assert "1,024" in message


def test_more_inputs_than_the_line_holds_are_413_never_429() -> None:
    """Trying again would not help, so it is not suggested."""
    with TestClient(create_app(fake_models(FakeEngine(room=4), max_queue=4))) as client:
        response = client.post("/v1/generate", json={"inputs": ["a"] * 5})
    refusal(response, 413, "too_large")
    assert "retry-after" not in response.headers


def test_a_full_line_is_429_with_retry_after(client: TestClient, engine: FakeEngine) -> None:
    """For a stream as well, as a status and not as an event."""
    engine.room = 1
    for stream in (False, True):
        response = client.post("/v1/generate", json={"inputs": ["a", "b"], "stream": stream})
        refusal(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1


def test_when_there_is_no_room_at_all_nothing_is_read(client: TestClient, engine: FakeEngine) -> None:
    """The refusal is cheap: what would be 400 if it were looked at is 429."""
    engine.room = 0
    for path in ("/v1/generate", "/v1/encode", "/v1/classify", "/v1/score"):
        refusal(client.post(path, content=b"not JSON"), 429, "queue_full")


def test_a_body_that_is_too_large_is_413(client: TestClient) -> None:
    """By its declared length, or when it turns out to be."""
    body = b'{"inputs": "' + b"a" * 2**21 + b'"}'
    assert "limit is 2,097,152" in refusal(client.post("/v1/generate", content=body), 413, "too_large")
    chunks = (body[start : start + 65536] for start in range(0, len(body), 65536))
    refusal(client.post("/v1/generate", content=chunks), 413, "too_large")


def test_bodies_are_bounded_together(engine: FakeEngine) -> None:
    """While some are held there is room for few more: 429, declared or in chunks; and all of it comes back."""
    models = fake_models(engine, max_body_bytes=2**20, max_bodies_bytes=1024)
    engine.may_work.clear()
    with TestClient(create_app(models)) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/v1/generate", json={"inputs": "a"})
        held = pool.submit(client.post, "/v1/generate", json={"inputs": ["c" * 60] * 9})
        while len(engine.open) < 10:
            time.sleep(0.01)
        body = json.dumps({"inputs": ["d" * 60] * 9}).encode()
        message = refusal(client.post("/v1/generate", content=body), 429, "queue_full")
        assert "of 1,024 bytes" in message
        refusal(client.post("/v1/generate", content=iter([body[:9], body[9:]])), 429, "queue_full")
        engine.may_work.set()
        assert first.result().status_code == held.result().status_code == 200
        assert client.post("/v1/generate", content=body).status_code == 200


@pytest.mark.parametrize("status", ["new", "starting", "draining", "stopped", "failed", "failing"])
def test_without_a_ready_engine_it_is_503(client: TestClient, engine: FakeEngine, status: str) -> None:
    """Loading, leaving or failing: requests and readiness say so, with Retry-After. The process is alive, unless its
    model fails."""
    engine.status = status
    for response in (client.post("/v1/generate", json={"inputs": "a"}), client.get("/readyz")):
        refusal(response, 503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
    alive = client.get("/healthz")
    if status in ("failed", "failing"):  # only a new process can be expected to help
        refusal(alive, 503, "unavailable")
    else:
        assert alive.status_code == 200
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("path", ["/nothing", "/v1/generate/", "/v1", "/docs/../x", "/%00", "/v1/generat%65x"])
def test_an_unknown_path_is_404(client: TestClient, path: str) -> None:
    """In the one shape; a slash at the end is another path."""
    refusal(client.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/generate", "POST"),
        ("OPTIONS", "/v1/generate", "POST"),
        ("PUT", "/v1/encode", "POST"),
        ("POST", "/healthz", "GET"),
        ("DELETE", "/v1/models", "GET"),
        ("BREW", "/metrics", "GET"),
    ],
)
def test_a_wrong_method_is_405_with_allow(client: TestClient, method: str, path: str, allowed: str) -> None:
    """And says which one it would be."""
    response = client.request(method, path)
    refusal(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/models"])
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    """Same status and content type, no body."""
    head, get = (client.request(method, path, follow_redirects=False) for method in ("HEAD", "GET"))
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers.get("content-type") == get.headers.get("content-type")


@pytest.mark.parametrize("sane", ["abc-123", "x" * 128, "!~"])
def test_a_sane_request_id_is_kept(client: TestClient, sane: str) -> None:
    """On answers and on errors."""
    for path in ("/healthz", "/nothing"):
        assert client.get(path, headers={"X-Request-ID": sane}).headers["x-request-id"] == sane


@pytest.mark.parametrize("insane", [b"", b"a b", b"x" * 129, b"caf\xe9", b"tab\there"])
def test_an_insane_request_id_is_replaced(client: TestClient, insane: bytes) -> None:
    """By a new one."""
    found = client.get("/nothing", headers={b"x-request-id": insane})  # type: ignore[dict-item]
    assert len(found.headers["x-request-id"]) == 32
    assert found.json()["request_id"] == found.headers["x-request-id"]


def test_an_unexpected_exception_is_500_in_the_one_shape(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an id; the log has the exception under it."""

    def submit(sequences: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine, "submit", submit)
    response = client.post("/v1/generate", json={"inputs": "a"}, headers={"X-Request-ID": "find-me"})
    assert "a bug" not in refusal(response, 500, "internal_error")
    assert "find-me" in caplog.text
    assert "a bug" in caplog.text


def test_neither_log_nor_metrics_hold_what_was_sent(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Texts, wrong values, unknown paths and queries stay out of both."""
    caplog.set_level(logging.DEBUG)
    secret = "Geheimnis"
    client.post("/v1/generate", json={"inputs": secret})
    client.post(f"/v1/generate?q={secret}", json={"inputs": "a", "model": secret})
    client.post("/v1/generate", json={"inputs": ["a", {"k": secret}], "stream": secret})
    client.post("/v1/generate", content=json.dumps({"inputs": secret})[:-1].encode())
    client.get(f"/{secret}")
    client.request(secret.upper(), "/healthz")
    found = (caplog.text + client.get("/metrics").text).lower()
    assert secret.lower() not in "".join(line for line in found.splitlines() if "httpx" not in line)
