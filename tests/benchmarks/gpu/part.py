"""The parts of the measurement, and the process that runs them: one that crashes or hangs takes no other along."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks.gpu.request import Request

MODULES = {
    "environment": "environment",
    "export": "export",
    "placement": "placement",
    "steps": "steps",
    "exactness": "exactness",
    "invariance": "invariance",
    "captured": "captured",
    "service": "throughput",
}
"""Every part and the module whose `look` it is; a module is imported when its part is run."""

OF_AN_ARTIFACT = ("placement", "steps", "exactness", "invariance", "captured", "service")
"""The parts that look at one artifact, in the order of their worth."""


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    part: str
    artifact: str | None
    status: Literal["done", "failed", "skipped"]
    seconds: float = 0.0
    result: dict[str, Any] | None = None
    """The part's own record."""
    problems: list[str] = field(default_factory=list)
    """What failed inside of it; the rest of the result holds."""
    error: str | None = None
    """The traceback, or how its process ended, if the part failed as a whole."""


def run(part: str, request: Request) -> Outcome:
    """In this process; never raises."""
    began = time.perf_counter()
    try:
        look: Callable[[Request], Any] = importlib.import_module(f"tests.benchmarks.gpu.{MODULES[part]}").look
        result = dataclasses.asdict(look(request))
    except Exception:
        return Outcome(part, request.name, "failed", time.perf_counter() - began, error=traceback.format_exc())
    finally:
        gc.collect()  # gives a device's memory back
    problems = result.pop("problems")
    return Outcome(part, request.name, "failed" if problems else "done", time.perf_counter() - began, result, problems)


class ProcessEnded(Exception):
    """The process of a call is gone; the message says how, and what it wrote last."""


class Child:
    """A process that runs one call after another, and is begun anew when it was ended by one or left in doubt."""

    def __init__(self, log: Path) -> None:
        """`log` takes what the processes write, which is not much unless they crash."""
        self._log = log
        self._context = multiprocessing.get_context("spawn")  # a device's context does not survive a fork
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives, which must not raise. Raises ProcessEnded, after `timeout` seconds at the latest."""
        if self._connection is None:
            self._begin()
        assert self._connection is not None
        try:
            self._connection.send((function, arguments))
            if self._connection.poll(timeout):
                return self._connection.recv()
            how = f"stopped after {timeout:.0f} s"
        except (EOFError, ConnectionError):
            self._process.join(10)
            how = f"the process ended with status {self._process.exitcode}"
        self.end()
        raise ProcessEnded(f"{how}\n{self._log.read_text(encoding='utf-8', errors='replace')[-4000:]}")

    def end(self) -> None:
        """End the process, if there is one; the next call has a new one."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._connection = None

    def _begin(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._log), daemon=True)
        self._process.start()
        theirs.close()


def _serve(connection: Connection, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(function(*arguments))
