"""What only real sockets show: large bodies, clients that leave, what is no HTTP. A real server in a thread."""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from service import protocol
from tests.service.fake_engine import FakeEngine
from tests.service.fake_server import RunningServer, running
from tests.service.sockets import (
    asking_for_vectors,
    connected_with_small_buffers,
    connections,
    eventually,
    exchange,
    give_small_buffers,
    post,
    troubles,
)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running(FakeEngine(step_seconds=0.01)) as server:
        yield server


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_mb_is_answered_not_reset(server: RunningServer, declared: bool) -> None:
    """A client that sends all before it reads gets the 413, whether or not it declared the length."""
    chunk = b"x" * 1_000_000
    content = chunk * 100 if declared else (chunk for _ in range(100))
    response = httpx.post(f"{server.url}/v1/generate", content=content, timeout=30)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "too_large"
    assert response.headers["connection"] == "close"


def test_a_client_that_asks_first_is_told_before_it_sends(server: RunningServer) -> None:
    """With `Expect: 100-continue` the 413 comes instead of the 100."""
    head = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_an_unread_small_body_keeps_the_connection(server: RunningServer) -> None:
    """A POST to nowhere is skipped, and the next request on the connection is answered."""
    with httpx.Client() as client:
        assert client.post(f"{server.url}/nothing", content=b"x" * 1000).status_code == 404
        assert client.post(f"{server.url}/v1/generate", content=b'{"inputs": "a"}').status_code == 200


BEAMS = {"num_beams": 4, "num_return_sequences": 2}
SAMPLES = {"do_sample": True, "num_return_sequences": 5}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/generate", {}),
        ("/v1/generate", {"parameters": BEAMS}),
        ("/v1/generate", {"parameters": SAMPLES}),
        ("/v1/encode", {}),
        ("/v1/classify", {}),
        ("/v1/score", {"targets": ["b"] * 3}),
    ],
)
def test_a_client_that_leaves_cancels_its_sequences(server: RunningServer, path: str, more: dict[str, Any]) -> None:
    """Without a stream: all of them, and the others' go on."""
    server.engine.may_work.clear()
    other: list[int] = []
    body = {"inputs": "b" * 40}
    thread = threading.Thread(
        target=lambda: other.append(httpx.post(f"{server.url}/v1/generate", json=body, timeout=60).status_code)
    )
    thread.start()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{path}", json={"inputs": ["a"] * 3, **more}, timeout=httpx.Timeout(30, read=0.5))
    assert eventually(lambda: len(server.engine.cancelled) == 3)
    server.engine.may_work.set()
    thread.join()
    assert other == [200]


@pytest.mark.parametrize("parameters", [{}, BEAMS, SAMPLES])
def test_a_client_that_leaves_a_stream_cancels_its_sequences(server: RunningServer, parameters: object) -> None:
    """After the first events."""
    body = {"inputs": ["a" * 40, "b" * 40], "stream": True, "parameters": parameters}
    with httpx.stream("POST", f"{server.url}/v1/generate", json=body) as response:
        next(response.iter_lines())
    assert eventually(lambda: len(server.engine.cancelled) == 2)
    assert not server.engine.open
    assert troubles(server, "client_left") == 1


def test_events_come_while_the_text_is_being_made(server: RunningServer) -> None:
    """The first one long before the last."""
    with httpx.stream("POST", f"{server.url}/v1/generate", json={"inputs": "a" * 40, "stream": True}) as response:
        times = [time.monotonic() for line in response.iter_lines() if line]
    assert len(times) > 20
    assert times[-1] - times[0] > 0.2


def test_many_clients_each_get_their_own_answer(server: RunningServer) -> None:
    """Sixty-four at once."""
    server.engine.step_seconds = 0.001
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answer = httpx.post(f"{server.url}/v1/generate", json={"inputs": f"text {number}"}, timeout=30).json()
        answers[number] = answer["outputs"][0]["sequences"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"text {number}" for number in range(64)}


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /a\xffb HTTP/1.1\r\n\r\n",
        b"POST /v1/generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/generate HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/generate HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_is_400_in_the_one_shape(server: RunningServer, request_bytes: bytes) -> None:
    """TLS on a plain port included."""
    head, _, body = exchange(server.port, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    problem = json.loads(body)
    assert problem["error"]["type"] == "invalid_request"
    assert f"x-request-id: {problem['request_id']}".encode() in head


@pytest.mark.parametrize("request_bytes", [b"GET /healthz HTTP/1.1\r\nX: %s\r\n\r\n", b"GET /%s HTTP/1.1\r\n\r\n"])
def test_an_endless_head_is_431(server: RunningServer, request_bytes: bytes) -> None:
    """Headers and request line are bounded in memory."""
    answer = exchange(server.port, request_bytes % (b"a" * (protocol.MAX_HEAD_BYTES + 1)))
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"headers_too_large"' in answer


def test_a_head_that_never_ends_is_closed(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client costs a socket for a bounded time."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    assert exchange(server.port, b"GET /healthz HTTP/1.1\r\nX: ") == b""
    assert troubles(server, "slow_head") == 1


def test_a_body_that_never_ends_is_408(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one shape; the connection is closed, and others are answered meanwhile."""
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.3)
    for path in (b"/v1/generate", b"/healthz"):
        answer = exchange(server.port, b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{" % path)
        assert answer.count(b"HTTP/1.1 408 ") == (path != b"/healthz")
    assert b'"request_timeout"' in exchange(server.port, post(b"")[:-4].replace(b": 0", b": 9") + b"\r\n\r\n{")
    assert troubles(server, "slow_body") == 2
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_who_never_reads_an_answer_is_cut_off(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is given up."""
    give_small_buffers(monkeypatch)
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.3)
    told: list[object] = []
    monkeypatch.setattr(protocol.logger, "info", lambda form, *words: told.append(form % words))
    request = asking_for_vectors(1000, "Connection: close")
    with connected_with_small_buffers(server) as connection:
        connection.sendall(request)
        time.sleep(3.0)
        received = 0
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += len(piece)
    whole = len(exchange(server.port, request))
    assert 0 < received < whole
    assert told == ["a client took next to nothing for 0.3 s: its connection is cut"]
    assert (troubles(server, "stalled_reader"), troubles(server, "client_left")) == (1, 0)


@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_who_never_reads_the_end_of_an_answer_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, headers: tuple[str, ...]
) -> None:
    """It is whole, and so small that nobody had to wait with writing it; but its connection cannot close before the
    client has it."""
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr("service.server.KEEP_ALIVE_SECONDS", 1)
    give_small_buffers(monkeypatch)
    with running(FakeEngine()) as server, connected_with_small_buffers(server) as connection:
        connection.sendall(asking_for_vectors(16, *headers))
        assert eventually(lambda: troubles(server, "stalled_reader") == 1)
        assert eventually(lambda: connections(server) == 0)
        assert troubles(server, "client_left") == 0


@pytest.mark.parametrize(
    "request_bytes", [b"GARBAGE", b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz"]
)
def test_who_was_refused_is_not_refused_again(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request_bytes: bytes
) -> None:
    """While it has its moment to read the refusal, the time for its head and body runs out."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request_bytes + b"\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        assert eventually(lambda: connections(server) == 0)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"x-request-id: ") == 1
    counts = {reason: troubles(server, reason) for reason in ("malformed", "slow_head", "slow_body", "client_left")}
    assert counts == {"malformed": 1, "slow_head": 0, "slow_body": 0, "client_left": 0}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_what_was_sent_ahead_of_garbage_is_answered(server: RunningServer) -> None:
    """A refusal overtakes no answer: whole requests get their own, then the connection closes."""
    answer = exchange(server.port, post(b'{"inputs": "echo"}') * 3 + b"GARBAGE\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b'"text":"echo"') == answer.count(b"HTTP/1.1 ") == 3
    assert troubles(server, "malformed") == 1


def test_a_client_that_sends_ahead_and_leaves_is_no_error(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Several requests are under way on its connection; all of them are given up."""
    server.engine.may_work.clear()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(post(b'{"inputs": "a"}') * 3)
        assert eventually(lambda: server.engine.open)
    assert eventually(lambda: len(server.engine.cancelled) == 1)
    server.engine.may_work.set()
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_offer_of_another_protocol_is_ignored(server: RunningServer) -> None:
    """Java's client offers h2c with its first request; the body is read all the same."""
    offer = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    assert b'"text":"hello"' in exchange(server.port, post(b'{"inputs": "hello"}', *offer))


def test_http_1_0_is_answered_and_closed(server: RunningServer) -> None:
    """As old tools and probes speak it."""
    assert exchange(server.port, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b'{"status":"alive"}')


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    """Three in one packet."""
    requests = [post(f'{{"inputs": "{word}"}}'.encode()) for word in ("one", "two")]
    answer = exchange(server.port, b"".join([*requests, post(b'{"inputs": "three"}', "Connection: close")]))
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.index(b'"one"') < answer.index(b'"two"') < answer.index(b'"three"')
