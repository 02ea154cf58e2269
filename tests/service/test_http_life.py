"""The life of the process: loading, serving, draining, leaving. The real server program around the fake engine."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from service.errors import SettingsError
from service.server import open_socket


@contextlib.contextmanager
def program(step_seconds: float, start_seconds: float, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address at which it answers."""
    command = [sys.executable, "-m", "tests.service.fake_server", str(step_seconds), str(start_seconds), "--port", "0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        until(url, "/healthz", 200)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def until(url: str, path: str, status: int, seconds: float = 20.0) -> httpx.Response:
    """The first answer of this status."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            response = httpx.get(url + path)
            if response.status_code == status:
                return response
        assert time.monotonic() < end, f"{path} never became {status}"
        time.sleep(0.02)


class Background(threading.Thread):
    """A request that is under way."""

    def __init__(self, url: str, body: object) -> None:
        super().__init__()
        self._url, self._body = url, body
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            self.response = httpx.post(f"{self._url}/v1/generate", json=self._body, timeout=30)

    def status(self) -> int | None:
        self.join()
        return self.response.status_code if self.response is not None else None


def test_from_loading_to_a_clean_end() -> None:
    """Loading: alive, not ready, 503. Ready: answers. SIGTERM while busy: at once not ready and 503, the accepted are
    answered to the end, exit status 0."""
    with program(0.02, 0.7) as (process, url):
        assert until(url, "/readyz", 503).headers["retry-after"]
        assert httpx.post(f"{url}/v1/generate", json={"inputs": "a"}).status_code == 503
        until(url, "/readyz", 200)
        whole = Background(url, {"inputs": "a" * 40})
        stream = Background(url, {"inputs": "b" * 40, "stream": True})
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        until(url, "/readyz", 503, seconds=0.5)
        refused = httpx.post(f"{url}/v1/generate", json={"inputs": "c"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert whole.status() == 200
        assert stream.status() == 200
        assert stream.response is not None
        assert stream.response.text.endswith("data: [DONE]\n\n")
        assert process.wait(5) == 0


def test_what_is_not_finished_in_time_is_answered_too() -> None:
    """After --drain-seconds the rest gets 503, and the process ends."""
    with program(0.2, 0.0, "--drain-seconds", "0.5") as (process, url):
        until(url, "/readyz", 200)
        slow = Background(url, {"inputs": "a" * 40})
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert slow.status() == 503
        assert process.wait(5) == 0


def test_a_second_signal_ends_at_once() -> None:
    """With the status of a killed process; SIGINT does as SIGTERM does."""
    with program(0.2, 0.0) as (process, url):
        until(url, "/readyz", 200)
        slow = Background(url, {"inputs": "a" * 40})
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        until(url, "/readyz", 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 128 + signal.SIGTERM
        assert slow.status() is None


def test_a_signal_while_loading_ends_at_once_and_well() -> None:
    """Nobody waits for a load that nobody needs any more."""
    with program(0.0, 60.0) as (process, url):
        until(url, "/readyz", 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(4) == 0


def test_a_client_that_never_finishes_sending_does_not_keep_the_process() -> None:
    """Half a request is no accepted request; the drain's time bounds it."""
    with program(0.0, 0.0, "--drain-seconds", "1") as (process, url):
        until(url, "/readyz", 200)
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(6) == 0


def test_a_taken_port_is_said_with_a_remedy() -> None:
    """And so is an address that is not this machine's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port}: .*in use.*--port"):
            open_socket("127.0.0.1", port)
    with pytest.raises(SettingsError, match="not an address"):
        open_socket("no such host", 0)
