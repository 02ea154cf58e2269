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
from tests.service.sockets import post


class Connection:
    """Tells when it is read."""

    def __init__(self) -> None:
        self.reads = True
        self.closing = False
        self.forget: Callable[[Connection], None] | None = None

    def pause(self, forget: Callable[[Connection], None]) -> bool:
        if self.closing:
            return False
        self.reads, self.forget = False, forget
        return True

    def go_on(self) -> None:
        assert not self.reads
        self.reads = True


class Play:
    """A ration, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ration = Ration(lambda: self.now)

    def refused_once(self, count: int) -> list[Connection]:
        """Connections that know the answer."""
        connections = [Connection() for _ in range(count)]
        for connection in connections:
            self.ration.take(connection)
        return connections


def play(scenario: Callable[[Play], None]) -> None:
    """On an event loop, whose timers are not waited for."""

    async def run() -> None:
        scenario(Play())

    asyncio.run(run())


def test_as_many_as_the_ration_allows_wait_for_nothing() -> None:
    """Second after second."""

    def scenario(play: Play) -> None:
        for number, connection in enumerate(play.refused_once(5 * int(REFUSALS_PER_SECOND))):
            play.now = 1000.0 + number / REFUSALS_PER_SECOND
            play.ration.take(connection)
            assert connection.reads

    play(scenario)


def test_more_wait_for_their_turn_in_order() -> None:
    """Clients that ask again whenever they are read are refused no more often than the ration allows."""

    def scenario(play: Play) -> None:
        everyone = play.refused_once(1000)
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
        everyone = play.refused_once(3000)
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


def test_the_first_refusal_of_a_connection_is_never_waited_for() -> None:
    """Its client may close it, and a connection that is not read does not notice: a crowd that comes anew each time
    would fill the server with connections that nobody holds any more."""

    def scenario(play: Play) -> None:
        assert all(connection.reads for connection in play.refused_once(10_000))
        assert play.ration.waiting == 0

    play(scenario)


def test_connections_that_close_leave_the_line() -> None:
    """Nothing is kept of them, however many there are."""

    def scenario(play: Play) -> None:
        for connection in play.refused_once(3000):
            play.ration.take(connection)
            if connection.forget is not None:
                connection.forget(connection)
        assert play.ration.waiting == 0
        for connection in play.refused_once(100):
            connection.closing = True
            play.ration.take(connection)
        assert play.ration.waiting == 0

    play(scenario)


def test_there_is_one_timer_however_often_the_line_is_empty() -> None:
    """Connections that wait and close, one after the other."""

    async def run() -> None:
        now = 1000.0
        turns = []

        class Counted(Ration):
            def go_on(self) -> None:
                turns.append(self.waiting)
                super().go_on()

        counted = Counted(lambda: now)
        for _ in range(1000):
            connection = Connection()
            counted.take(connection)
            counted.take(connection)
            if connection.forget is not None:
                connection.forget(connection)
        await asyncio.sleep(0.1)
        assert turns == [0]

    asyncio.run(run())


def test_a_flood_of_others_takes_half_of_the_ration_at_most() -> None:
    """Those who wait are read again, though others who leave after two refusals use up more than there is."""

    def scenario(play: Play) -> None:
        patient = play.refused_once(1000)
        for connection in patient:
            play.ration.take(connection)
        held = play.ration.waiting
        assert held > 900
        for tick in range(500):
            play.now = 1000.0 + tick * 0.02
            for passer in play.refused_once(20):  # a thousand a second
                play.ration.take(passer)
                if passer.forget is not None:
                    passer.forget(passer)
            play.ration.go_on()
        assert all(connection.reads for connection in patient)

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


@pytest.mark.parametrize("headers", [[], ["Connection: close"]])
def test_a_crowd_that_connects_anew_each_time_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, headers: list[str]
) -> None:
    """Whoever leaves after a refusal is seen to leave, however many came before."""
    monkeypatch.setattr(ration, "REFUSALS_PER_SECOND", 20.0)
    with running(FakeEngine(room=0)) as server, httpx.Client() as client:
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as passer:
                passer.sendall(post(b'{"inputs": "a"}', *headers))
                assert passer.recv(65536).startswith(b"HTTP/1.1 429 ")
        deadline = time.monotonic() + 3
        while "transduce_connections 1.0" not in (page := client.get(f"{server.url}/metrics").text):
            assert time.monotonic() < deadline, page
        assert "transduce_connections_held 0.0" in page
