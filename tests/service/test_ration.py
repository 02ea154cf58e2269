"""How many refusals are given at once, and when the others' connections are read again."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable

import httpx2 as httpx
import pytest

from service import ration
from service.keys import make_key
from service.ration import REFUSALS_PER_SECOND, Ration
from tests.service.fake_engine import FakeEngine
from tests.service.fake_server import running
from tests.service.test_http_sockets import post


class Connection:
    """Tells when it is read."""

    def __init__(self) -> None:
        self.reads = True

    def pause(self) -> None:
        self.reads = False

    def go_on(self) -> None:
        assert not self.reads
        self.reads = True


class Play:
    """A ration, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ration = Ration(lambda: self.now)


def play(scenario: Callable[[Play], None]) -> None:
    """On an event loop, whose timers are not waited for."""

    async def run() -> None:
        scenario(Play())

    asyncio.run(run())


def test_as_many_as_the_ration_allows_wait_for_nothing() -> None:
    """Second after second."""

    def scenario(play: Play) -> None:
        for number in range(5 * int(REFUSALS_PER_SECOND)):
            play.now = 1000.0 + number / REFUSALS_PER_SECOND
            connection = Connection()
            play.ration.take(connection)
            assert connection.reads

    play(scenario)


def test_more_wait_for_their_turn_in_order() -> None:
    """Clients that ask again whenever they are read are refused no more often than the ration allows."""

    def scenario(play: Play) -> None:
        everyone = [Connection() for _ in range(1000)]
        turns = []
        for tick in range(500):
            play.now = 1000.0 + tick * 0.02
            play.ration.go_on()
            for connection in everyone:
                if connection.reads:
                    turns.append(connection)
                    play.ration.take(connection)
        assert len(turns) <= 10 * REFUSALS_PER_SECOND + 1000 - REFUSALS_PER_SECOND + 40
        assert min(turns.count(connection) for connection in everyone) >= 2

    play(scenario)


def test_who_does_not_ask_again_keeps_nobody_waiting() -> None:
    """After a crowd all are read again within seconds, forty at a time: there may be room by then."""

    def scenario(play: Play) -> None:
        everyone = [Connection() for _ in range(3000)]
        for connection in everyone:
            play.ration.take(connection)
        play.ration.go_on()
        assert sum(connection.reads for connection in everyone) == 40
        assert play.ration.waiting == 3000 - 40
        for _ in range(130):
            play.now += 0.02
            play.ration.go_on()
        assert play.ration.waiting == 0
        assert all(connection.reads for connection in everyone)

    play(scenario)


@pytest.mark.parametrize(("path", "status"), [("/v1/generate", 401), ("/v1/models", 401), ("/metrics", 401)])
def test_guessing_keys_is_slow(monkeypatch: pytest.MonkeyPatch, path: str, status: int) -> None:
    """What the application refuses for want of a key counts as well."""
    monkeypatch.setattr(ration, "REFUSALS_PER_SECOND", 20.0)
    with running(FakeEngine(), api_keys=str(make_key("alice")[1])) as server, httpx.Client() as client:
        began = time.monotonic()
        for _ in range(60):
            assert client.get(server.url + path).status_code == status
        assert time.monotonic() - began > 0.9
        assert client.get(f"{server.url}/healthz").status_code == 200


def test_a_flood_on_a_connection_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends waits outside; probes and what can be let in are answered meanwhile, and nothing is lost."""
    monkeypatch.setattr(ration, "REFUSALS_PER_SECOND", 20.0)
    body = json.dumps({"inputs": "a"}).encode()
    with (
        running(FakeEngine(room=0)) as server,
        httpx.Client() as client,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as flood,
    ):
        flood.sendall(post(body) * 60)  # in one piece: each is answered, and the next one has to wait
        answer = b""
        while answer.count(b"queue_full") < 60:
            answer += flood.recv(65536)
        began = time.monotonic()
        flood.sendall(post(body))
        for _ in range(5):
            assert client.get(f"{server.url}/healthz").status_code == 200
        assert "transduce_connections_held 1.0" in client.get(f"{server.url}/metrics").text
        assert client.post(f"{server.url}/v1/generate", content=body).status_code == 429
        assert time.monotonic() - began < 1.5
        flood.settimeout(0.2)
        with pytest.raises(TimeoutError):
            flood.recv(65536)
        flood.settimeout(30)
        server.engine.room = 10
        assert flood.recv(65536).startswith(b"HTTP/1.1 200 ")
