"""Requests for which there is no room, answered by the protocol over real sockets, as the application would."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator

import httpx2 as httpx
import pytest

from service import protocol
from service.keys import make_key
from service.logs import Words
from service.trail import Trail
from tests.service.fake_engine import FakeEngine
from tests.service.fake_server import RunningServer, running
from tests.service.sockets import eventually, exchange, post

ONE = b'{"inputs": "a"}'


@pytest.fixture
def full() -> Iterator[RunningServer]:
    with running(FakeEngine(room=0)) as server:
        yield server


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of requests that reach the application."""
    ids: list[str] = []

    def trail(request_id: str) -> Trail:
        ids.append(request_id)
        return Trail(request_id)

    monkeypatch.setattr("service.middleware.Trail", trail)
    return ids


def count(server: RunningServer, name: str, **labels: str) -> float | None:
    return server.model.metrics.registry.get_sample_value(f"transduce_{name}", {"model_name": "echo", **labels})


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/encode", "/v1/classify", "/v1/score"])
def test_the_answer_is_the_applications(full: RunningServer, entered: list[str], path: str) -> None:
    """The same status, header names and words, whichever of them gives it; both count it."""
    headers = {"x-request-id": "mine", "content-type": "application/json"}
    early = httpx.post(full.url + path, content=ONE, headers=headers)
    assert not entered
    late = httpx.post(full.url + path, content=iter([ONE]), headers=headers)
    assert entered == ["mine"]
    assert early.status_code == late.status_code == 429
    error = {"type": "queue_full", "message": "the line is full"}
    assert early.json() == late.json() == {"error": error, "request_id": "mine"}
    assert set(late.headers) - set(early.headers) == {"connection"}  # who sends in chunks may send for long
    assert early.headers["content-type"] == late.headers["content-type"] == "application/json"
    assert int(early.headers["retry-after"]) == int(late.headers["retry-after"]) >= 1
    assert eventually(lambda: count(full, "http_requests_total", endpoint=path, status="429") == 2)
    assert count(full, "request_failures_total", type="queue_full") == 2


def test_everything_else_is_let_in(full: RunningServer, entered: list[str]) -> None:
    """Health, models, metrics, and what is no route."""
    for path, status in [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/v1/models", 200), ("/other", 404)]:
        assert httpx.get(full.url + path).status_code == status
    assert httpx.get(f"{full.url}/v1/generate").status_code == 405
    full.engine.status = "draining"
    assert httpx.post(f"{full.url}/v1/generate", content=ONE).status_code == 503
    assert len(entered) == 7


def test_the_body_is_skipped_wherever_it_ends(full: RunningServer) -> None:
    """The connection stays: what comes of it after the answer is no part of the next request."""
    body = json.dumps({"inputs": "b" * 40}).encode()
    whole = post(body)
    with socket.create_connection(("127.0.0.1", full.port), timeout=10) as connection:
        for cut in (len(whole), len(whole) - len(body), len(whole) - 5):
            full.engine.room = 0
            connection.sendall(whole[:cut])
            assert connection.recv(65536).startswith(b"HTTP/1.1 429 ")
            full.engine.room = 1
            connection.sendall(whole[cut:] + whole)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_never_comes_ends_the_connection(full: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.2)
    answer = exchange(full.port, post(ONE)[:-1])
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_who_wants_the_connection_closed_gets_it_closed(full: RunningServer, version: str) -> None:
    headers = () if version == "1.0" else ("Connection: close",)
    answer = exchange(full.port, post(ONE, *headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
    assert b"\r\nconnection: close\r\n" in answer


def test_a_client_that_asks_first_is_told_before_it_sends(full: RunningServer) -> None:
    """The 429 in place of `100 Continue`."""
    with socket.create_connection(("127.0.0.1", full.port), timeout=10) as connection:
        connection.sendall(post(ONE, "Expect: 100-continue")[: -len(ONE)])
        assert connection.recv(65536).startswith(b"HTTP/1.1 429 ")


def test_a_long_body_is_not_awaited(full: RunningServer, entered: list[str]) -> None:
    """The application refuses it, since it knows how to let a client finish."""
    response = httpx.post(f"{full.url}/v1/generate", content=b"x" * 200_000)
    assert response.status_code == 429
    assert response.headers["connection"] == "close"
    assert len(entered) == 1


def test_requests_sent_ahead_are_refused_in_their_turn(full: RunningServer, entered: list[str]) -> None:
    """Behind one that is being answered, nothing is said until it is."""
    full.engine.room = 1
    full.engine.may_work.clear()
    with socket.create_connection(("127.0.0.1", full.port), timeout=10) as connection:
        connection.sendall(post(b'{"inputs": "first"}') + post(ONE))
        assert eventually(lambda: full.engine.open)
        full.engine.room = 0
        full.engine.may_work.set()
        answer = b""
        while b"queue_full" not in answer:
            answer += connection.recv(65536)
    assert answer.index(b'"text":"first"') < answer.index(b"HTTP/1.1 429 ")
    assert len(entered) == 1


def test_thousands_sent_ahead_are_all_answered(full: RunningServer) -> None:
    """In order, without a call in a call for each."""
    requests = [post(ONE, f"X-Request-Id: {number}") for number in range(5000)]
    answer = exchange(full.port, b"".join([*requests, post(ONE, "X-Request-Id: last", "Connection: close")]))
    ids = [line.rpartition(b" ")[2] for line in answer.split(b"\r\n") if line.startswith(b"x-request-id")]
    assert ids == [*(str(number).encode() for number in range(5000)), b"last"]
    assert answer.count(b"HTTP/1.1 429 ") == 5001


def test_who_does_not_read_is_not_read_either(full: RunningServer) -> None:
    """Refusals do not pile up in memory for a client that goes on asking."""
    with socket.create_connection(("127.0.0.1", full.port)) as connection:
        connection.settimeout(2)
        with pytest.raises(TimeoutError):
            connection.sendall(post(ONE) * 500_000)
    assert httpx.get(f"{full.url}/healthz").status_code == 200


def test_whose_key_it_is_decides(entered: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Without one it is 401 as ever; the log has the client's name."""
    caplog.set_level(logging.INFO)
    key, entry = make_key("alice")
    with running(FakeEngine(room=0), api_keys=str(entry)) as server:
        url = f"{server.url}/v1/generate"
        assert httpx.post(url, content=ONE).status_code == 401
        assert httpx.post(url, content=ONE, headers={"Authorization": "Bearer other"}).status_code == 401
        assert len(entered) == 2
        assert httpx.post(url, content=ONE, headers={"Authorization": f"Bearer {key}"}).status_code == 429
        assert len(entered) == 2
    (line,) = [r.msg for r in caplog.records if isinstance(r.msg, Words) and r.msg["status"] == 429]
    assert {name: line[name] for name in ("method", "endpoint", "client")} == {
        "method": "POST",
        "endpoint": "/v1/generate",
        "client": "alice",
    }
    assert key not in caplog.text


def test_of_many_a_line_a_second_is_logged(full: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """And every one is counted."""
    caplog.set_level(logging.INFO)
    with httpx.Client() as client:
        for _ in range(50):
            assert client.post(f"{full.url}/v1/generate", content=ONE).status_code == 429
    assert 1 <= sum(isinstance(record.msg, Words) for record in caplog.records) < 10
    assert count(full, "http_requests_total", endpoint="/v1/generate", status="429") == 50
