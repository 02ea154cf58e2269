"""Clients that speak to a server over real sockets, byte by byte, and what its metrics say of them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service import protocol
from tests.service.fake_server import RunningServer


def eventually(claim: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether `claim` becomes true in time."""
    end = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def troubles(server: RunningServer, reason: str) -> float:
    """How many connections ended so."""
    value = server.model.metrics.registry.get_sample_value("transduce_connection_troubles_total", {"reason": reason})
    assert value is not None
    return value


def connections(server: RunningServer) -> float | None:
    """How many are open."""
    return server.model.metrics.registry.get_sample_value("transduce_connections")


def exchange(port: int, request: bytes) -> bytes:
    """What the server says to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def post(body: bytes, *headers: str) -> bytes:
    head = ["POST /v1/generate HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def give_small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the server's side of each new connection; here the kernel takes megabytes for a client that sleeps."""
    made = protocol.Protocol.connection_made

    def with_small_buffers(self: protocol.Protocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(protocol.Protocol, "connection_made", with_small_buffers)


@contextlib.contextmanager
def connected_with_small_buffers(server: RunningServer) -> Iterator[socket.socket]:
    """A client that can be told little at a time."""
    with socket.socket() as connection:
        connection.settimeout(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it is told to the other side
        connection.connect(("127.0.0.1", server.port))
        yield connection


def asking_for_vectors(number: int, *headers: str) -> bytes:
    """Of so many texts of sixty tokens: 2 KB each."""
    body = b'{"inputs": [%s], "pooling": "none"}' % b", ".join([b'"%s"' % (b"a" * 60)] * number)
    return post(body, *headers).replace(b"/v1/generate", b"/v1/encode")
