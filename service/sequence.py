"""A sequence: one input of one call, and what became of it. The events by which the engine tells.

Knows neither text nor tensors: token ids in, token ids or vectors out.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from service.errors import RequestError
from service.patterns import Patterns

if TYPE_CHECKING:
    from service.search import Search

Kind: TypeAlias = Literal["generate", "encode", "score", "classify"]
FinishReason: TypeAlias = Literal["stop", "length", "timeout"]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GenerateParameters:
    """How to generate. The names are those of Hugging Face transformers, and so are the meanings, unless said here.

    Greedy by default: at each step the most probable token. Whoever makes these has checked that they fit together.
    """

    max_new_tokens: int
    """Tokens to generate at most after the prefix, the end token included. The model's limit bounds prefix and new."""
    min_new_tokens: int = 0
    """Tokens to generate before the end token may come."""
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    """Beams are ranked by (sum of log-probabilities) / (number of tokens) ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    seed: int | None = None
    """None: another text each time."""
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    """0: n-grams may be repeated."""
    stop: Patterns | None = None
    """A sequence ends with the token that completes one of these texts, found in what follows the prefix."""
    suppress: Patterns | None = None
    """A token that would complete one of these texts is never taken; the prefix counts as text before it."""
    prefix_ids: tuple[int, ...] = ()
    """Target tokens to begin with. They are not part of a result."""
    return_alternatives: bool = False
    """The `num_return_sequences` most probable tokens after the prefix, each completed."""
    return_alignments: bool = False

    @property
    def rows(self) -> int:
        """Rows of the decoder's batch that a search with these may take."""
        if self.return_alternatives:
            return self.num_return_sequences * self.num_beams
        return max(self.num_return_sequences, self.num_beams)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the sequence was submitted."""

    queued: float
    """Until it left the line."""
    first_token: float | None
    """Until its first step was done; None for what has no steps."""
    total: float
    """Until it was finished."""
    encoded: float | None = None
    """Until its source was encoded; None for what is over with that."""


@dataclass(frozen=True, slots=True)
class Token:
    """What became certain by a step, for sequences with `stream`. The end token comes too.

    With beams a token is certain when all hypotheses that can still win share it. What was not certain before the end
    comes with `Finished` alone.
    """

    id: int
    log_probability: float
    result: int = 0
    """Which of the results it belongs to."""


@dataclass(frozen=True, slots=True)
class Result:
    """One generated text: the tokens after the prefix, the end token included if it came.

    A stop string does not cut `ids`; the tokens that complete it are the last ones. Log-probabilities are the model's
    own, whatever bent the search.
    """

    ids: list[int]
    log_probabilities: list[float]
    reason: FinishReason
    alignment: Floats | None = None
    """(len(ids), source length) attention weights, each row sums to 1; present with `return_alignments`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Generation ended with `num_return_sequences` results, the best first; fewer if fewer could be found."""

    results: list[Result]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's output: `memory` is (length, embedding_size) float32, one vector per source token, no padding."""

    memory: Floats
    timings: Timings


@dataclass(frozen=True, slots=True)
class Scored:
    """A given target's log-probabilities, one per token, the end token included."""

    log_probabilities: list[float]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The end without a result."""

    error: RequestError


Event: TypeAlias = Token | Finished | Encoded | Scored | Failed


class Stage(enum.Enum):
    """Where a sequence is: it only ever moves forward."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


class Sequence:
    """One input of one call.

    The caller sets what is above the line and reads events; the rest belongs to the engine, from `submit` on.
    Each sequence gets exactly one of Finished, Encoded, Scored or Failed, unless it is cancelled: then it gets nothing
    more once the engine has seen the cancellation. `on_event` is called on the engine's thread: it must be quick and
    must not block, and what it raises is logged and dropped.
    """

    __slots__ = (
        "admitted_at", "client", "deadline", "encoded_at", "endpoint", "first_token_at", "held", "kind", "on_event",
        "parameters", "search", "source_ids", "stage", "stream", "submitted_at", "target_ids", "worker",
    )  # fmt: skip

    def __init__(
        self,
        source_ids: list[int],
        on_event: Callable[[Event], None],
        *,
        kind: Kind = "generate",
        parameters: GenerateParameters | None = None,
        target_ids: list[int] | None = None,
        deadline: float | None = None,
        stream: bool = False,
        endpoint: str | None = None,
        client: str = "",
    ) -> None:
        if kind == "generate" and parameters is None:
            raise ValueError("a sequence of kind generate has parameters")
        if kind == "score" and not target_ids:
            raise ValueError("a sequence of kind score has a target")
        self.source_ids = source_ids
        """Token ids, the end token included."""
        self.on_event = on_event
        self.kind = kind
        self.parameters = parameters
        self.target_ids = target_ids
        """Of kind score: the target's token ids, the end token included."""
        self.deadline = deadline
        """On the engine's clock (time.monotonic), None for no limit."""
        self.stream = stream
        """Whether Token events are wanted."""
        self.endpoint: str = kind if endpoint is None else endpoint
        """The metrics' label: a short fixed word, never anything that a client wrote."""
        self.client = client
        """Whose it is, for a fair share; empty where nobody is told apart."""
        # ---- the engine's ----
        self.stage = Stage.NEW
        self.worker = 0
        self.search: Search | None = None
        self.held: list[int] = []
        self.submitted_at = 0.0
        self.admitted_at = 0.0
        self.encoded_at = 0.0
        self.first_token_at = 0.0

    @property
    def rows(self) -> int:
        """Rows of the decoder's batch that are set aside for it."""
        return 0 if self.parameters is None else self.parameters.rows

    @property
    def tokens(self) -> int:
        """Tokens that wait with it: of the source, and of a given target."""
        return len(self.source_ids) + (0 if self.target_ids is None else len(self.target_ids))

    def __repr__(self) -> str:
        return f"<Sequence {self.kind} {self.stage.value}, {len(self.source_ids)} source tokens>"
