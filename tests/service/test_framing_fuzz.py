"""Bytes that are no HTTP, or almost: thousands of them, to a real server over real sockets.

Whatever comes, each connection is answered or closed in time, nothing is answered as the server's own fault, nothing
is left behind, and ordinary requests in between keep their exact answers.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from service import protocol
from tests.service.fake_engine import FakeEngine
from tests.service.fake_server import RunningServer, running

PATIENCE = 20.0
"""Seconds in which a connection has to be answered or closed; the server gives its slowest clients two."""

BODY = b'{"inputs": ["a", "bc"]}'
HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\n"


def chunked(*pieces: bytes, head: bytes = HEAD) -> bytes:
    """A request whose body comes as these chunks, as they are."""
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(pieces)


def sized(length: bytes, body: bytes = BODY, *headers: bytes) -> bytes:
    """A request with this Content-Length, right or wrong."""
    return (
        HEAD
        + b"Content-Length: "
        + length
        + b"\r\n"
        + b"".join(header + b"\r\n" for header in headers)
        + b"\r\n"
        + body
    )


VALID = [
    sized(b"%d" % len(BODY)),
    sized(b"%d" % len(BODY), BODY, b"Expect: 100-continue"),
    sized(b"%d" % len(BODY), BODY, b"Connection: close", b"X-Request-ID: abc"),
    chunked(b"%x\r\n%s\r\n" % (len(BODY), BODY), b"0\r\n\r\n"),
    chunked(*(b"1\r\n%c\r\n" % byte for byte in BODY), b"0\r\nTrailer: x\r\n\r\n"),
    sized(b"%d" % len(BODY)) * 3,
    sized(b"37", b'{"inputs": "a", "stream": true      }'),
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://x/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /readyz HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
]
"""What mutations begin with."""

BROKEN = [
    b"",
    b"\r\n" * 100,
    b"\x00" * 1000,
    bytes(range(256)) * 10,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100,  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 50,
    b"GET /healthz\r\n\r\n",  # HTTP/0.9
    b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET  /healthz  HTTP/1.1\r\nHost: x\r\n\r\n",
    b"get /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"BREW /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /%ff%00%zz?%%& HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\nHost: x\n\n",
    b"GET /healthz HTTP/1.1\r\nHost x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nX: a\r\n b\r\n\r\n",  # a folded header
    b"GET /healthz HTTP/1.1\r\nX\x00: a\x00b\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    sized(b"-1"),
    sized(b"+23"),
    sized(b"0x17"),
    sized(b"1e3"),
    sized(b"9" * 30),
    sized(b"23, 23"),
    sized(b"23", BODY, b"Content-Length: 24"),
    sized(b"23", BODY, b"Transfer-Encoding: chunked"),
    sized(b"5"),
    sized(b"500"),
    sized(b"0"),
    HEAD + b"\r\n" + BODY,
    HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    chunked(b"zz\r\n", BODY),
    chunked(b"-1\r\n", BODY),
    chunked(b"ffffffffffffffffff\r\n", BODY),
    chunked(b"17\r\n", BODY, b"extra\r\n0\r\n\r\n"),
    chunked(b"17;name=value\r\n", BODY, b"\r\n0\r\n\r\n"),
    chunked(b"17" + b";a=b" * 30_000 + b"\r\n", BODY, b"\r\n0\r\n\r\n"),
    chunked(b"17\r\n", BODY, b"\r\n0\r\n" + b"Trailer: x\r\n" * 20_000 + b"\r\n"),
    chunked(b"0\r\n\r\n"),
    chunked(b"17\n", BODY, b"\n0\n\n"),
    VALID[0] + b"GARBAGE\r\n\r\n",
    VALID[0] + VALID[7] + b"\x00",
    VALID[7] * 200,
]
"""What is known to break servers."""

FRAGMENTS = [
    b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"0\r\n\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.1", b"HTTP/1.0",
    b"\xff\xfe", b"GET / HTTP/1.1\r\n\r\n", b"fffffff\r\n", b"{" * 100, b"a" * 5000,
]  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """A valid request with a few bytes changed, lost, repeated or put in."""
    data = bytearray(rng.choice(VALID))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if place < len(data):
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 20)]
            case 2:
                data[place:place] = rng.choice(FRAGMENTS)
            case 3:
                data[place:place] = data[place : place + rng.randint(1, 60)]
            case _:
                del data[place:]
    return bytes(data)


def converse(port: int, data: bytes, rng: random.Random) -> bytes:
    """Send it in one of the ways that clients have, and what is said until the end. TimeoutError if there is none."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        try:
            manner = rng.randrange(8)
            if manner == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(data)
                return said  # gone, with a reset
            cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(1, 5) if manner < 3 else 0))
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                connection.sendall(data[start:end])
                time.sleep(rng.random() / 50 if cuts else 0)
            if manner != 3:  # else it waits for the server to lose patience
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                said += piece
        except TimeoutError:
            raise
        except OSError:  # the server has closed already
            return said
    return said


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "STALLED_SECONDS"):
        monkeypatch.setattr(protocol, name, 1.0)
    monkeypatch.setattr("service.server.KEEP_ALIVE_SECONDS", 1)
    with running(FakeEngine()) as server:
        yield server


def ask(client: httpx.Client, server: RunningServer) -> None:
    """An ordinary request, whose answer is known."""
    answer = client.post(f"{server.url}/v1/generate", json={"inputs": ["echo", "and again"]}).json()
    assert [output["sequences"][0]["text"] for output in answer["outputs"]] == ["echo", "and again"]


def survives(server: RunningServer, cases: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    """The claims of this file, for these cases."""
    caplog.set_level(logging.WARNING)
    registry = server.model.metrics.registry
    over, troubles = threading.Event(), []

    def go_on_asking() -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not over.is_set():
                try:
                    ask(client, server)
                except Exception as error:
                    troubles.append(error)
                    return

    def play(number: int) -> None:
        said = converse(server.port, cases[number], random.Random(number))
        statuses = re.findall(rb"^HTTP/1\.1 (\d\d\d) ", said, re.M)
        assert all(b"100" <= status < b"500" for status in statuses), (number, cases[number], said)
        assert not said or statuses, (number, cases[number], said)

    with httpx.Client(timeout=PATIENCE) as client:
        ask(client, server)
        files = len(os.listdir("/proc/self/fd"))
        asking = threading.Thread(target=go_on_asking)
        asking.start()
        try:
            with ThreadPoolExecutor(24) as pool:
                for _ in pool.map(play, range(len(cases))):
                    pass
        finally:
            over.set()
            asking.join()
        assert not troubles
        ask(client, server)
        end = time.monotonic() + PATIENCE
        while (registry.get_sample_value("transduce_connections") or 0) > 1 or server.engine.open:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert len(os.listdir("/proc/self/fd")) <= files + 2
    unforeseen = [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert not unforeseen, [record.getMessage() for record in unforeseen]


def test_what_is_known_to_break_servers(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Each case in several manners: whole, in pieces, with and without an end, gone in the middle."""
    survives(server, BROKEN * 3 + VALID, caplog)


def test_mutations_of_valid_requests(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Some hundreds, from a seed."""
    survives(server, [mutated(random.Random(seed)) for seed in range(300)], caplog)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_mutations(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Others, and all of them in one server's life."""
    survives(server, [mutated(random.Random(seed)) for seed in range(10_000, 16_000)], caplog)
