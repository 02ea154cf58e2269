"""How many connections there may be, and which of them make room."""

from __future__ import annotations

import contextlib
import socket

import httpx2 as httpx
import pytest
from prometheus_client import CollectorRegistry

from service.connections import Connections
from service.metrics import Families
from tests.service.fake_engine import FakeEngine
from tests.service.fake_server import running
from tests.service.sockets import connections, eventually, exchange, post, troubles


def test_connections_are_bounded() -> None:
    """One beyond those that are worked for is told so and closed, and costs nobody an answer; far too many are not even
    told."""
    with running(FakeEngine(), max_connections=4) as server, contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))

        server.engine.may_work.clear()
        working = [connect() for _ in range(4)]
        for connection in working:
            connection.sendall(post(b'{"inputs": "a"}'))
        assert eventually(lambda: len(server.engine.open) == 4)
        refused = exchange(server.port, b"")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in refused
        assert b'"unavailable"' in refused
        late = [connect() for _ in range(12)]
        assert eventually(lambda: troubles(server, "too_many") == 13)
        said = []
        for connection in late:
            with contextlib.suppress(ConnectionError):
                said.append(connection.recv(65536))
        assert 1 <= sum(answer.startswith(b"HTTP/1.1 503 ") for answer in said) < 12
        server.engine.may_work.set()
        for connection in working:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection in [*working, *late]:
            connection.close()
        assert eventually(lambda: connections(server) == 0)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert troubles(server, "made_room") == 0


def test_who_keeps_the_server_waiting_makes_room() -> None:
    """Where connections have reached their limit, the one that has sent nothing whole for the longest time is closed
    for a new one: be it silent, in the middle of a head or of a body, or between two requests."""
    with running(FakeEngine(), max_connections=4) as server, contextlib.ExitStack() as stack:

        def connect(request: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            connection.sendall(request)
            return connection

        whole = post(b'{"inputs": "a"}')
        server.engine.may_work.clear()
        working = connect(whole)
        assert eventually(lambda: len(server.engine.open) == 1)
        waiting = [connect(b"")]
        for request in (whole[:20], whole[:-5]):
            waiting.append(connect(request))
            assert eventually(lambda: connections(server) == len(waiting) + 1)
        for connection in list(waiting):
            answer = exchange(server.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert connection.recv(65536) == b""
            waiting.append(connect(b""))
            assert eventually(lambda: connections(server) == 4)
        assert troubles(server, "made_room") == 3
        assert troubles(server, "too_many") == 0
        server.engine.may_work.set()
        assert working.recv(65536).startswith(b"HTTP/1.1 200 ")
        asked_last = connect(b"")  # closes the first of the silent ones: `working` has only just become idle
        assert waiting[3].recv(65536) == b""
        working.sendall(whole)
        assert working.recv(65536).startswith(b"HTTP/1.1 200 ")
        asked_last.sendall(whole)
        assert asked_last.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("soft", "hard", "limit"), [(1024, 1 << 20, 4096), (1024, 2048, 1920), (1 << 20, 1 << 20, 4096)]
)
def test_connections_need_file_descriptors(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, limit: int) -> None:
    """As many as the limit wants are asked for; what the system does not give lowers it."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("service.connections.resource.getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr("service.connections.resource.setrlimit", lambda _, limits: asked.append(limits))
    assert Connections(4096, Families(CollectorRegistry())).limit == limit
    assert asked == ([] if soft == hard else [(limit + 128, hard)])
