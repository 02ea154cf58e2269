"""The alerts, each by what it is there for: real servers in real trouble, a real Prometheus, durations shortened."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.monitored import RULES, Prometheus, Server, again_and_again, hurried, prometheus, tool, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TEXT = "The children are playing in the garden, and nobody knows where they have come from."
WINDOW = "10s"
PATIENCE = 60
"""Seconds in which an alert has to come."""


BROKEN_ONCE_TOLD = """
import pathlib, time
from service.runner import Runner
whole = Runner.step
def step(self, *arguments, **named):
    if pathlib.Path({file!r}).exists():
        {trouble}
    return whole(self, *arguments, **named)
Runner.step = step
"""
"""What is run in a server, so that its decoder steps fail, or never end, from the moment that a file is there."""


@pytest.fixture(autouse=True)
def _prometheus() -> None:
    """Looked for before any server is started."""
    tool("prometheus")


@contextmanager
def watched(directory: Path, *servers: Server) -> Iterator[Prometheus]:
    """A Prometheus with the hurried rules over servers that are stopped at the end."""
    with ExitStack() as after:
        for server in servers:
            after.callback(server.stop)
        ports = {f"transduce-{number}": server.port for number, server in enumerate(servers)}
        yield after.enter_context(prometheus(directory, ports, hurried(RULES, WINDOW)))


def comes(prometheus: Prometheus, alert: str, seconds: float = PATIENCE) -> dict[str, Any]:
    """The alert, when it fires."""
    return until(lambda: prometheus.firing().get(alert), seconds, alert)  # type: ignore[no-any-return]


def calm(prometheus: Prometheus) -> None:
    """Nothing fires over an ordinary server, for longer than the hurried rules wait."""
    until(lambda: prometheus.query("up == 1"), 10, "a scrape")
    for _ in range(5):
        time.sleep(1)
        assert set(prometheus.firing()) == set()


def test_a_server_that_dies_is_down_and_the_last_one_absent(tmp_path: Path) -> None:
    """And nothing fires while both live and work."""
    one, other = Server(), Server()
    with watched(tmp_path, one, other) as prometheus:
        with again_and_again(lambda: one.post("/v1/generate", {"inputs": TEXT}), pause=0.1):
            calm(prometheus)
        one.stop()
        assert comes(prometheus, "TransduceDown")["labels"]["pod"] == "transduce-0"
        assert "TransduceAbsent" not in prometheus.firing()
        other.stop()
        comes(prometheus, "TransduceAbsent")


def test_a_full_line_refuses(tmp_path: Path) -> None:
    """More callers than the line has places."""
    server = Server("--max-rows", "1", "--max-queue", "2")
    call = {"inputs": TEXT, "parameters": {"num_beams": 1}}
    with watched(tmp_path, server) as prometheus:
        calm(prometheus)
        with again_and_again(*[lambda: server.post("/v1/generate", call)] * 12):
            alert = comes(prometheus, "TransduceRefusing")
        assert alert["annotations"]["summary"].endswith("% of the requests are refused with 429, the line being full.")


def test_a_long_line_queues(tmp_path: Path) -> None:
    """One row, and a thousand requests at once."""
    server = Server("--max-rows", "1")
    with watched(tmp_path, server) as prometheus, ThreadPoolExecutor(1) as pool:
        calm(prometheus)
        crowd = pool.submit(server.post, "/v1/generate", {"inputs": [TEXT] * 1000})
        comes(prometheus, "TransduceQueueing")
        server.stop()
        assert crowd.exception() is not None or crowd.result().status_code == 200


def test_requests_that_run_out_of_time_are_timeouts(tmp_path: Path) -> None:
    """Whether in line or while they are generated."""
    server = Server()
    with watched(tmp_path, server) as prometheus:
        calm(prometheus)
        with again_and_again(lambda: server.post("/v1/generate", {"inputs": TEXT, "parameters": {"timeout": 0.005}})):
            comes(prometheus, "TransduceTimeouts")


def test_a_server_that_drains_is_not_ready_and_unavailable(tmp_path: Path) -> None:
    """It answers its probe with 503, and clients that are still sent to it."""
    server = Server("--max-rows", "1", "--drain-seconds", "100")
    with watched(tmp_path, server) as prometheus, ThreadPoolExecutor(1) as pool:
        with again_and_again(lambda: server.get("/readyz"), pause=0.5):
            calm(prometheus)
        crowd = pool.submit(server.post, "/v1/generate", {"inputs": [TEXT] * 1024})
        until(lambda: prometheus.query("transduce_num_requests_waiting > 500"), 20, "a crowd in line")
        server.process.send_signal(signal.SIGTERM)
        with again_and_again(
            lambda: server.get("/readyz"), lambda: server.post("/v1/generate", {"inputs": TEXT}), pause=0.2
        ):
            comes(prometheus, "TransduceNotReady")
            comes(prometheus, "TransduceUnavailable")
        assert not crowd.done(), "it drained all the while"
        server.stop()
        assert crowd.exception() is not None


def test_a_server_that_starts_again_and_again_is_restarting(tmp_path: Path) -> None:
    """After three starts on one address, not after two. The window is longer here, for each takes seconds."""
    server = Server()
    with prometheus(tmp_path, {"transduce-0": server.port}, hurried(RULES, "100s")) as running:
        try:
            until(lambda: running.query("up == 1"), 10, "a scrape")
            for starts in (1, 2, 3):
                server.stop()
                server = Server(port=server.port)
                seen = f"changes(process_start_time_seconds[100s]) == {starts}"
                until(lambda seen=seen: running.query(seen), 20, seen)
                if starts < 3:
                    time.sleep(2)
                    assert "TransduceRestarting" not in running.firing()
            comes(running, "TransduceRestarting")
        finally:
            server.stop()


def test_a_server_that_hardly_gets_a_processor_is_slow(tmp_path: Path) -> None:
    """Held for a third of a second after a few steps, as a container without its share would be."""
    server = Server("--workers", "1")
    with watched(tmp_path, server) as prometheus:
        calm(prometheus)

        def hold() -> None:
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGCONT)
            time.sleep(0.04)

        crowd = {"inputs": [TEXT] * 128}
        with again_and_again(hold, pause=0), again_and_again(lambda: server.post("/v1/generate", crowd)):
            comes(prometheus, "TransduceSlow")
        server.stop()


def test_a_model_that_fails_at_times_gives_errors(tmp_path: Path) -> None:
    """Every third decoder step raises: requests are 500, and as it works in between the server stays alive."""
    told = tmp_path / "told"
    trouble = "Runner.steps = getattr(Runner, 'steps', 0) + 1; assert Runner.steps % 3"
    server = Server(before=BROKEN_ONCE_TOLD.format(file=str(told), trouble=trouble))
    with watched(tmp_path, server) as prometheus:
        with again_and_again(lambda: server.post("/v1/generate", {"inputs": TEXT}), pause=0.1):
            calm(prometheus)
            told.touch()
            comes(prometheus, "TransduceErrors")
            comes(prometheus, "TransduceModelFailing")
        assert server.get("/healthz").status_code == 200


def test_a_model_that_fails_at_everything_ends_the_pod(tmp_path: Path) -> None:
    """Every step raises, those of the self-test, too: the liveness probe is told, and readiness."""
    told = tmp_path / "told"
    server = Server(before=BROKEN_ONCE_TOLD.format(file=str(told), trouble="raise RuntimeError('broken')"))
    with watched(tmp_path, server) as prometheus:
        with again_and_again(lambda: server.post("/v1/generate", {"inputs": TEXT}), pause=0.1):
            calm(prometheus)
            told.touch()
            assert comes(prometheus, "TransduceModelFailing")["labels"]["call"] == "step"
            comes(prometheus, "TransduceUnavailable")
        assert (server.get("/healthz").status_code, server.get("/readyz").status_code) == (503, 503)


def test_an_engine_that_hangs_is_stalled(tmp_path: Path) -> None:
    """A decoder step that never ends, while HTTP answers: its probes see nothing."""
    told = tmp_path / "told"
    server = Server(before=BROKEN_ONCE_TOLD.format(file=str(told), trouble="time.sleep(1000)"))
    with watched(tmp_path, server) as prometheus, ThreadPoolExecutor(2) as pool:
        with again_and_again(lambda: server.post("/v1/generate", {"inputs": TEXT}), pause=0.1):
            calm(prometheus)
        told.touch()
        # The first hang in a step, and are counted as running only after it; the others wait behind them.
        asked = [pool.submit(server.post, "/v1/generate", {"inputs": [TEXT] * 100}) for _ in range(2)]
        comes(prometheus, "TransduceStalled")
        assert (server.get("/healthz").status_code, server.get("/readyz").status_code) == (200, 200)
        server.stop()
        assert all(call.exception() is not None for call in asked)
