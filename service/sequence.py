"""A sequence: one input of one call, and what became of it. The events by which the engine tells.

Knows neither text nor tensors: token ids in, token ids or vectors out.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from service.errors import RequestError

Kind: TypeAlias = Literal["generate", "encode"]
FinishReason: TypeAlias = Literal["stop", "length", "timeout"]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GenerateParameters:
    """How to generate. Greedy: at each step the most probable token."""

    max_new_tokens: int
    """Tokens to generate at most, the end token included; from 1 to the manifest's `max_target_tokens`."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the sequence was submitted."""

    queued: float
    """Until it left the line."""
    first_token: float | None
    """Until its first token was known; None for an encoding."""
    total: float
    """Until it was finished."""


@dataclass(frozen=True, slots=True)
class Token:
    """One step's result, for sequences with `stream`. The end token comes too; `Finished` follows the last one."""

    id: int
    log_probability: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Generation ended. `ids` holds every generated token, the end token included if it came (reason "stop")."""

    reason: FinishReason
    ids: list[int]
    log_probabilities: list[float]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's output: `memory` is (length, embedding_size) float32, one vector per source token, no padding."""

    memory: Floats
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The end without a result."""

    error: RequestError


Event: TypeAlias = Token | Finished | Encoded | Failed


class Stage(enum.Enum):
    """Where a sequence is: it only ever moves forward."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


class Sequence:
    """One input of one call.

    The caller sets what is above the line and reads events; the rest belongs to the engine, from `submit` on.
    Each sequence gets exactly one of Finished, Encoded or Failed, unless it is cancelled: then it gets nothing more
    once the engine has seen the cancellation. `on_event` is called on the engine's thread: it must be quick and must
    not block, and what it raises is logged and dropped.
    """

    __slots__ = (
        "admitted_at", "deadline", "endpoint", "first_token_at", "kind", "on_event", "parameters", "row", "source_ids",
        "stage", "stream", "submitted_at",
    )  # fmt: skip

    def __init__(
        self,
        source_ids: list[int],
        on_event: Callable[[Event], None],
        *,
        kind: Kind = "generate",
        parameters: GenerateParameters | None = None,
        deadline: float | None = None,
        stream: bool = False,
        endpoint: str | None = None,
    ) -> None:
        if kind == "generate" and parameters is None:
            raise ValueError("a sequence of kind generate has parameters")
        self.source_ids = source_ids
        """Token ids, the end token included."""
        self.on_event = on_event
        self.kind = kind
        self.parameters = parameters
        self.deadline = deadline
        """On the engine's clock (time.monotonic), None for no limit."""
        self.stream = stream
        """Whether a Token event is wanted for every step."""
        self.endpoint: str = kind if endpoint is None else endpoint
        """The metrics' label: a short fixed word, never anything that a client wrote."""
        # ---- the engine's ----
        self.stage = Stage.NEW
        self.row = -1
        self.submitted_at = 0.0
        self.admitted_at = 0.0
        self.first_token_at = 0.0

    @property
    def rows(self) -> int:
        """Rows that it takes in the decoder's batch."""
        return 1 if self.kind == "generate" else 0

    def __repr__(self) -> str:
        return f"<Sequence {self.kind} {self.stage.value}, {len(self.source_ids)} source tokens>"
