"""The running batch on the host: one entry per row in each array, dense at the front. Also pads token ids.

Rows here and rows of the state are the same rows; the engine changes both together. Knows neither graphs nor policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.arrangement import Arrangement
from service.sequence import Sequence

Ints = npt.NDArray[np.int64]


def pad(sources: list[list[int]], length: int, pad_id: int) -> tuple[Ints, Ints]:
    """(rows, length) ids filled up with `pad_id`, and (rows,) true lengths."""
    ids = np.full((len(sources), length), pad_id, np.int64)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = source
    return ids, np.fromiter(map(len, sources), np.int64, len(sources))


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step says of each row. Views of buffers that the next step overwrites."""

    ids: Ints  # (rows, k), best first
    log_probabilities: npt.NDArray[np.float32]  # (rows, k)
    logits: npt.NDArray[np.float32] | None  # (rows, vocabulary)


class Batch:
    """What the engine knows of each running row. The first `rows` entries of every array are in use.

    A sequence begins in one row; one with a search of its own may take more. `Sequence.held` names them.
    """

    def __init__(self, *, max_rows: int, max_target_tokens: int, bos_id: int) -> None:
        self.rows = 0
        self.sequences: list[Sequence] = []  # of each row
        self.searching: list[Sequence] = []  # those with a search of their own, each once
        self.last_ids: Ints = np.zeros(max_rows, np.int64)  # the token that the next step reads
        self.positions: Ints = np.zeros(max_rows, np.int64)  # steps taken so far
        self.source_lengths: Ints = np.zeros(max_rows, np.int64)
        self.plain = np.zeros(max_rows, np.bool_)  # rows that are decoded greedily, without a search of their own
        # ---- of plain rows only ----
        self.limits: Ints = np.zeros(max_rows, np.int64)  # tokens to generate at most
        self.deadlines = np.full(max_rows, math.inf)  # seconds, on the engine's clock
        self.streams = np.zeros(max_rows, np.bool_)
        self.ids: Ints = np.zeros((max_rows, max_target_tokens), np.int64)
        self.log_probabilities = np.zeros((max_rows, max_target_tokens), np.float32)
        self._bos_id = bos_id
        self._every_row = np.arange(max_rows)
        self._arrays = (
            self.last_ids, self.positions, self.source_lengths, self.plain, self.limits, self.deadlines, self.streams,
            self.ids, self.log_probabilities,
        )  # fmt: skip

    def append(self, sequences: list[Sequence]) -> None:
        """Let sequences of kind generate begin, each in the next free row."""
        for row, sequence in enumerate(sequences, start=self.rows):
            assert sequence.parameters is not None
            sequence.held = [row]
            plain = sequence.search is None
            self.last_ids[row] = self._bos_id
            self.positions[row] = 0
            self.source_lengths[row] = len(sequence.source_ids)
            self.plain[row] = plain
            self.limits[row] = sequence.parameters.max_new_tokens
            self.deadlines[row] = math.inf if sequence.deadline is None else sequence.deadline
            self.streams[row] = plain and sequence.stream
            if not plain:
                self.searching.append(sequence)
        self.sequences.extend(sequences)
        self.rows += len(sequences)

    def take(self, ids: Ints, log_probabilities: npt.NDArray[np.float32]) -> None:
        """Every row goes on by one token (rows,). Searches give the tokens of their rows afterwards, by `feed`."""
        rows = self._every_row[: self.rows]
        positions = self.positions[: self.rows]
        self.ids[rows, positions] = ids
        self.log_probabilities[rows, positions] = log_probabilities
        self.last_ids[: self.rows] = ids
        positions += 1

    def feed(self, sequence: Sequence, ids: list[int]) -> None:
        """The tokens that the rows of a sequence read next."""
        self.last_ids[sequence.held] = ids

    def result(self, row: int) -> tuple[list[int], list[float]]:
        """Everything that a plain row has generated: ids and log-probabilities."""
        length = self.positions[row]
        return self.ids[row, :length].tolist(), self.log_probabilities[row, :length].tolist()

    def rearrange(self, move: Arrangement) -> None:
        """Put rows in the order of an arrangement that was made for this batch, and tell the sequences their places."""
        order = move.order
        moved = np.flatnonzero(order != self._every_row[: len(order)])
        if moved.size:
            for array in self._arrays:
                array[moved] = array[order[moved]]
        self.sequences = move.sequences
        for sequence, held in move.held.items():
            sequence.held = held
        if move.left:
            self.searching = [sequence for sequence in self.searching if sequence not in move.left]
        self.rows = len(order)

    def clear(self) -> None:
        """Drop all rows."""
        self.rows = 0
        self.sequences, self.searching = [], []

    def __repr__(self) -> str:
        return f"<Batch {self.rows} rows>"
