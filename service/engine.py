"""The engine: one thread that owns token ids, rows and sessions. Commands go in by a queue, events come out.

Signatures are final; the work follows.
"""

from __future__ import annotations

from typing import Literal

from service.artifact import Artifact
from service.metrics import Metrics
from service.sequence import Sequence
from service.settings import Settings

Status = Literal["new", "starting", "ready", "draining", "stopped", "failed"]


class Engine:
    """Serves one artifact. Thread-safe: every public method may be called from any thread but the engine's own."""

    def __init__(self, artifact: Artifact, settings: Settings, metrics: Metrics) -> None: ...

    @property
    def status(self) -> Status:
        """Where it is in its life. `ready` is the only one in which `submit` accepts."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread: open the sessions, run the self-test, warm up. Returns at once."""

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Block until ready: True; False if the time ran out. Raises the StartupError with which starting failed."""
        raise NotImplementedError

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all of them or none. Raises TooLarge (could never fit), QueueFull or Unavailable at once."""

    def cancel(self, sequences: list[Sequence]) -> None:
        """Give them up, wherever they are: their rows are free within a step. No event follows."""

    def drain(self, seconds: float) -> None:
        """Accept nothing more, answer what was accepted, then stop; after `seconds` the rest fails with Unavailable.

        Returns at once; `join` waits.
        """

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if the time ran out."""
        raise NotImplementedError

    def stop(self) -> None:
        """Fail what is left with Unavailable, end the thread, and wait for that."""

    def describe(self) -> dict[str, object]:
        """Facts for people: provider, precision, threads, memory bound. For the log and /v1/models."""
        raise NotImplementedError
