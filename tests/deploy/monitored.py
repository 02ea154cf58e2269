"""A real Prometheus over real servers, for the tests of dashboard, autoscalers and alerts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from tests.deploy.manifests import DEPLOY

RULES = yaml.safe_load((DEPLOY / "components/monitoring/prometheusrule.yaml").read_text())["spec"]["groups"]
MONITOR = yaml.safe_load((DEPLOY / "components/monitoring/servicemonitor.yaml").read_text())["spec"]["endpoints"][0]


def tool(name: str) -> str:
    """prometheus or promtool; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: apt-get install prometheus brings it (Debian)")
    return found


def promtool(*arguments: str, text: str = "") -> str:
    """What promtool says; a failure of it is one of the test."""
    outcome = subprocess.run(
        [tool("promtool"), *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first truth of `condition`, looked for so long."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if found := condition():
                return found
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


class Server:
    """`transduce serve` on the default artifact, in a process of its own."""

    def __init__(self, *flags: str, port: int | None = None, before: str = "pass") -> None:
        """`before` is code that runs first in its process, to break something there."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        code = f"import sys\n{before}\nfrom service.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "serve", "--port", str(self.port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: self.process.poll() is not None or self.get("/readyz").status_code == 200, 60, "ready")
            assert self.process.poll() is None, f"it ended with status {self.process.poll()}"
        except AssertionError:
            self.stop()
            raise

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=5)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def stop(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        self.process.wait(60)


class Prometheus:
    """One that scrapes `ports` every second as the ServiceMonitor would have it, and evaluates `groups` of rules."""

    def __init__(self, directory: Path, ports: dict[str, int], groups: Any = ()) -> None:
        """`ports` by the name that the pod shall have."""
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (directory / "rules.yml").write_text(yaml.safe_dump({"groups": list(groups)}))
        labels = {"namespace": "transduce", "service": "transduce", "container": "transduce", "endpoint": "http"}
        scrape = {
            "job_name": "transduce",
            "honor_labels": MONITOR["honorLabels"],
            "metrics_path": MONITOR["path"],
            "static_configs": [
                {"targets": [f"127.0.0.1:{port}"], "labels": {**labels, "pod": pod}} for pod, port in ports.items()
            ],
        }
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [scrape],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (directory / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                tool("prometheus"), f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stdout=self._log, stderr=self._log, env=dict(os.environ, GOMAXPROCS="1"),
        )  # fmt: skip
        until(lambda: httpx.get(f"{self.url}/-/ready").status_code == 200, 60, "Prometheus")

    def query(self, expression: str) -> list[Any]:
        """The series that an expression has now, without those that are not a number."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        return [one for one in answer["data"]["result"] if one["value"][1] != "NaN"]

    def series(self, selector: str) -> list[dict[str, str]]:
        """The label sets that a selector finds."""
        answer = httpx.get(f"{self.url}/api/v1/series", params={"match[]": selector}, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]  # type: ignore[no-any-return]

    def firing(self) -> dict[str, dict[str, Any]]:
        """The alerts that fire now, by name."""
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


@contextlib.contextmanager
def prometheus(directory: Path, ports: dict[str, int], groups: Any = ()) -> Iterator[Prometheus]:
    """A running one."""
    running = Prometheus(directory, ports, groups)
    try:
        yield running
    finally:
        running.stop()


def hurried(groups: Any, window: str) -> Any:
    """Rules with the durations of a test, and nothing else changed: windows are `window`, every `for` two seconds."""
    text = re.sub(r"\[\d+m\]", f"[{window}]", json.dumps(groups))
    return json.loads(re.sub(r'"for": "\d+m"', '"for": "2s"', text))


@contextlib.contextmanager
def again_and_again(*calls: Callable[[], Any], pause: float = 0.02) -> Iterator[None]:
    """Makes the calls, each in a thread of its own, until the block ends."""
    ended = threading.Event()

    def repeat(call: Callable[[], Any]) -> None:
        while not ended.is_set():
            with contextlib.suppress(httpx.TransportError):
                call()
            ended.wait(pause)

    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
