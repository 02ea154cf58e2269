"""What a core asks of a runner: an interface, so that neither has to know the other."""

from __future__ import annotations

from typing import Protocol

from service.artifact import Manifest, VariantName
from service.batch import Batch, Ints, StepOutput
from service.ladder import Ladder
from service.sequence import Floats
from service.state import State


class Executes(Protocol):
    """Runs the graphs of one artifact."""

    @property
    def manifest(self) -> Manifest:
        """Of the artifact whose graphs it runs."""

    @property
    def variant(self) -> VariantName:
        """Which of the artifact's variants it runs."""

    @property
    def generates(self) -> bool:
        """Whether there is a decoder."""

    @property
    def scores(self) -> bool:
        """Whether there is a scorer."""

    @property
    def aligns(self) -> bool:
        """Whether the scorer gives alignments."""

    def new_state(self, *, max_rows: int, source: Ladder, target: Ladder) -> State:
        """Empty buffers."""

    def encode_into(self, state: State, ids: Ints, lengths: Ints) -> None:
        """Encode into the rows after those in use."""

    def encode(self, ids: Ints, lengths: Ints) -> Floats:
        """The encoder's memory."""

    def classify(self, ids: Ints, lengths: Ints) -> Floats:
        """A classifier's logits of each token."""

    def score(
        self, source_ids: Ints, source_lengths: Ints, target_ids: Ints, *, alignment: bool
    ) -> tuple[Floats, Floats | None]:
        """Log-probabilities (rows, target) of given targets, and attention (rows, target, source) if asked for."""

    def step(self, batch: Batch, state: State, k: int, logits: bool) -> StepOutput:
        """The k best candidates of each row, and its logits if they are wanted."""
