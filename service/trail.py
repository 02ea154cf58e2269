"""What became of one HTTP request: whose it was, what it asked of the engine, and when. Counts and times, no text.

One is made for each request, and those who serve it write down what they know; the log line, the header Server-Timing
and the traces read it. Used on the event loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from service.sequence import Encoded, Event, Failed, Finished, Scored, Sequence, Timings

KEPT = 16
"""Inputs whose own times are kept, of a call with more: each is a few spans of a trace."""


@dataclass(frozen=True, slots=True)
class Step:
    """One input's way through the engine."""

    index: int
    kind: str
    source_tokens: int
    generated_tokens: int
    timings: Timings


@dataclass(slots=True)
class Trail:
    """Moments are on the clock of `time.monotonic`, which is the engine's too."""

    request_id: str
    began: float = field(default_factory=time.monotonic)
    client: str = ""
    """Whose key it was, empty where nobody is told apart."""
    model: str | None = None
    """Which model was asked, as soon as that is known."""
    body_bytes: int = 0
    answer_bytes: int = 0
    """Of a large answer that is expected or has come."""
    read: float | None = None
    """When the body had been read."""
    submitted: float | None = None
    """When the engine had been given the inputs."""
    inputs: int = 0
    source_tokens: int = 0
    generated_tokens: int = 0
    queued_seconds: float = 0.0
    """Of the input that stood in line for longest."""
    engine_seconds: float | None = None
    """From submission to the end of the last input that came to its end."""
    steps: list[Step] = field(default_factory=list)

    def submit(self, sequences: dict[int, Sequence]) -> None:
        """These are about to be given to the engine."""
        self.submitted = time.monotonic()
        self.source_tokens = sum(len(sequence.source_ids) for sequence in sequences.values())

    def end(self, index: int, sequence: Sequence, event: Event) -> None:
        """An input came to its end."""
        if not isinstance(event, (Finished, Encoded, Scored)):
            assert isinstance(event, Failed)
            return
        generated = sum(len(result.ids) for result in event.results) if isinstance(event, Finished) else 0
        self.generated_tokens += generated
        self.queued_seconds = max(self.queued_seconds, event.timings.queued)
        self.engine_seconds = max(self.engine_seconds or 0.0, event.timings.total)
        if len(self.steps) < KEPT:
            self.steps.append(Step(index, sequence.kind, len(sequence.source_ids), generated, event.timings))

    @property
    def words(self) -> dict[str, object]:
        """For a log line: what is known."""
        known: dict[str, object] = {}
        if self.client:
            known["client"] = self.client
        if self.model is not None:
            known["model"] = self.model
        if self.body_bytes:
            known["body_bytes"] = self.body_bytes
        if self.inputs:
            known["inputs"] = self.inputs
        if self.submitted is not None:
            known |= {"source_tokens": self.source_tokens, "generated_tokens": self.generated_tokens}
        if self.engine_seconds is not None:
            known |= {
                "queued_seconds": round(self.queued_seconds, 4),
                "engine_seconds": round(self.engine_seconds, 4),
            }
        return known

    @property
    def server_timing(self) -> str | None:
        """The header Server-Timing (W3C), in milliseconds; None before the engine has answered."""
        if self.engine_seconds is None or self.submitted is None:
            return None
        parts = {
            "prepare": self.submitted - self.began,
            "queue": self.queued_seconds,
            "engine": self.engine_seconds,
            "total": time.monotonic() - self.began,
        }
        return ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in parts.items())
