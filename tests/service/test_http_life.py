"""The life of the process: loading, serving, draining, leaving. The real server program around the fake engine, or
where threads that do not end are the matter, around the default model.
"""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import pytest

from service.errors import SettingsError
from service.server import open_socket


class Program:
    """The process: where it answers, and the gates of its engine."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.service.fake_server", "--port", "0", *flags]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        until(self.url, "/healthz", 200)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def open_gate(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")

    def load(self) -> None:
        self.open_gate("load")
        until(self.url, "/readyz", 200)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def status(self, seconds: float) -> int:
        """The exit status, which comes in time."""
        return self._process.wait(seconds)


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


def connected(port: int, seconds: float = 20.0) -> socket.socket:
    """A connection, as soon as it is listened there."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def until_submitted(url: str, count: int) -> None:
    """Until the fake engine holds so many sequences; it tells in the list of models."""
    end = time.monotonic() + 20
    while httpx.get(f"{url}/v1/models").json()["data"][0]["engine"]["open"] < count:
        assert time.monotonic() < end
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
    with Program() as program:
        url = program.url
        assert until(url, "/readyz", 503).headers["retry-after"]
        assert httpx.post(f"{url}/v1/generate", json={"inputs": "a"}).status_code == 503
        program.load()
        whole = Background(url, {"inputs": "a" * 40})
        stream = Background(url, {"inputs": "b" * 40, "stream": True})
        until_submitted(url, 2)
        program.signal(signal.SIGTERM)
        until(url, "/readyz", 503)
        refused = httpx.post(f"{url}/v1/generate", json={"inputs": "c"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.headers["connection"] == "close"
        assert httpx.get(f"{url}/healthz").status_code == 200
        program.open_gate("work")
        assert whole.status() == 200
        assert stream.status() == 200
        assert stream.response is not None
        assert stream.response.text.endswith("data: [DONE]\n\n")
        assert program.status(10) == 0


def test_what_is_not_finished_in_time_is_answered_too() -> None:
    """After --drain-seconds the rest gets 503, and the process ends."""
    with Program("--drain-seconds", "0.5") as program:
        program.load()
        slow = Background(program.url, {"inputs": "a" * 40})
        until_submitted(program.url, 1)
        program.signal(signal.SIGTERM)
        assert slow.status() == 503
        assert program.status(10) == 0


def test_a_second_signal_ends_at_once_and_answers_what_it_can() -> None:
    """With the status of a killed process; SIGINT does as SIGTERM does. Who waits is told."""
    with Program() as program:
        program.load()
        slow = Background(program.url, {"inputs": "a" * 40})
        until_submitted(program.url, 1)
        program.signal(signal.SIGINT)
        until(program.url, "/readyz", 503)
        began = time.monotonic()
        program.signal(signal.SIGTERM)
        assert program.status(10) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
        assert slow.status() == 503


def test_after_a_second_signal_nobody_keeps_the_process() -> None:
    """Not one who never finishes sending; and a third signal waits for nothing."""
    for signals in ([signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]):
        with Program("--drain-seconds", "60") as program:
            program.load()
            with socket.create_connection(("127.0.0.1", program.port)) as connection:
                connection.sendall(b"POST /v1/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
                time.sleep(0.2)
                began = time.monotonic()
                for number in signals:
                    program.signal(number)
                    time.sleep(0.2)
                assert program.status(10) == 128 + signals[-1]
                assert time.monotonic() - began < 5


def test_a_signal_while_loading_ends_at_once_and_well() -> None:
    """Nobody waits for a load that nobody needs any more."""
    with Program() as program:
        until(program.url, "/readyz", 503)
        program.signal(signal.SIGTERM)
        assert program.status(10) == 0


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_a_signal_while_a_real_model_is_loaded_ends_well_too(seconds: float) -> None:
    """Threads inside of ONNX Runtime do not survive the interpreter: the process was aborted after it had said 0."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--provider", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stderr is not None
            port = next(int(found[1]) for line in program.stderr if (found := re.search(r"http://[\d.]+:(\d+)", line)))
            connected(port).close()  # it listens, so it takes signals
            time.sleep(seconds)
            program.send_signal(signal.SIGTERM)
            assert program.wait(20) == 0
            assert "stopped status=0" in program.stderr.read()
        finally:
            program.kill()


WEDGED = """
import sys, threading
import service.server
from service.cli import main
from service.core import Core
service.server.ENGINE_SECONDS = 0.1
Core.close = lambda self: threading.Event().wait()
sys.exit(main(["serve", "--port", "0", "--provider", "cpu", "--drain-seconds", "0.1"]))
"""
"""Its worker never comes to its end."""


def test_a_model_that_hangs_does_not_keep_the_process() -> None:
    """It has its time and the drain's, then the process ends, and its status says that not all went well."""
    with subprocess.Popen([sys.executable, "-c", WEDGED], stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stderr is not None
            assert any(line.endswith("transduce.server ready\n") for line in program.stderr)
            program.send_signal(signal.SIGTERM)
            assert program.wait(20) == 1
            assert "the engines did not end in time" in program.stderr.read()
        finally:
            program.kill()


def test_a_client_that_never_finishes_sending_does_not_keep_the_process() -> None:
    """Half a request is no accepted request; the drain's time bounds it."""
    with Program("--drain-seconds", "1") as program:
        program.load()
        with socket.create_connection(("127.0.0.1", program.port)) as connection:
            connection.sendall(b"POST /v1/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
            program.signal(signal.SIGTERM)
            assert program.status(15) == 0


def test_a_taken_port_is_said_with_a_remedy() -> None:
    """And so is an address that is not this machine's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port}: .*in use.*--port"):
            open_socket("127.0.0.1", port)
    with pytest.raises(SettingsError, match="not an address"):
        open_socket("no such host", 0)
