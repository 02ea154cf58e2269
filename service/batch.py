"""The running batch on the host: one entry per row in each array, dense at the front. Also pads sources.

Rows here and rows of the state are the same rows; the engine changes both together. Knows neither graphs nor policy.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from service.sequence import Sequence

Ints = npt.NDArray[np.int64]


def pad(sources: list[list[int]], length: int, pad_id: int) -> tuple[Ints, Ints]:
    """(rows, length) ids filled up with `pad_id`, and (rows,) true lengths."""
    ids = np.full((len(sources), length), pad_id, np.int64)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = source
    return ids, np.fromiter(map(len, sources), np.int64, len(sources))


class Batch:
    """What the engine knows of each running row. The first `rows` entries of every array are in use."""

    def __init__(self, *, max_rows: int, max_target_tokens: int, bos_id: int) -> None:
        self.rows = 0
        self.sequences: list[Sequence] = []
        self.last_ids: Ints = np.zeros(max_rows, np.int64)  # the token that the next step reads
        self.positions: Ints = np.zeros(max_rows, np.int64)  # tokens generated so far
        self.source_lengths: Ints = np.zeros(max_rows, np.int64)
        self.limits: Ints = np.zeros(max_rows, np.int64)  # tokens to generate at most
        self.deadlines = np.full(max_rows, math.inf)  # seconds, on the engine's clock
        self.streams = np.zeros(max_rows, np.bool_)
        self.ids: Ints = np.zeros((max_rows, max_target_tokens), np.int64)
        self.log_probabilities = np.zeros((max_rows, max_target_tokens), np.float32)
        self._bos_id = bos_id
        self._every_row = np.arange(max_rows)
        self._arrays = (
            self.last_ids, self.positions, self.source_lengths, self.limits, self.deadlines, self.streams,
            self.ids, self.log_probabilities,
        )  # fmt: skip

    def append(self, sequences: list[Sequence]) -> None:
        """Let sequences of kind generate begin, each in the next free row."""
        for row, sequence in enumerate(sequences, start=self.rows):
            assert sequence.parameters is not None
            sequence.row = row
            self.last_ids[row] = self._bos_id
            self.positions[row] = 0
            self.source_lengths[row] = len(sequence.source_ids)
            self.limits[row] = sequence.parameters.max_new_tokens
            self.deadlines[row] = math.inf if sequence.deadline is None else sequence.deadline
            self.streams[row] = sequence.stream
        self.sequences.extend(sequences)
        self.rows += len(sequences)

    def take(self, ids: Ints, log_probabilities: npt.NDArray[np.float32]) -> None:
        """Every row goes on by one token."""
        rows = self._every_row[: self.rows]
        positions = self.positions[: self.rows]
        self.ids[rows, positions] = ids
        self.log_probabilities[rows, positions] = log_probabilities
        self.last_ids[: self.rows] = ids
        positions += 1

    def result(self, row: int) -> tuple[list[int], list[float]]:
        """Everything that a row has generated: ids and log-probabilities."""
        length = self.positions[row]
        return self.ids[row, :length].tolist(), self.log_probabilities[row, :length].tolist()

    def without(self, leaving: list[int]) -> Ints:
        """The dense order after these rows left: entry i is the row that comes to place i.

        Only the last rows move, each into a gap in front of it.
        """
        stays = np.ones(self.rows, np.bool_)
        stays[leaving] = False
        count = int(np.count_nonzero(stays))
        order = self._every_row[:count].copy()
        order[~stays[:count]] = count + np.flatnonzero(stays[count:])
        return order

    def keep(self, order: Ints) -> None:
        """Row i becomes what row `order[i]` was; rows that are not named are gone."""
        moved = np.flatnonzero(order != self._every_row[: len(order)])
        if moved.size:
            for array in self._arrays:
                array[moved] = array[order[moved]]
        self.sequences = [self.sequences[row] for row in order.tolist()]
        for row in moved.tolist():
            self.sequences[row].row = row
        self.rows = len(order)

    def __repr__(self) -> str:
        return f"<Batch {self.rows} rows>"
