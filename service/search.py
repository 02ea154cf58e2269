"""Search: which token each row takes, and which rows are at their end. Works on candidates (rows, k)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.batch import Batch
from service.sequence import FinishReason

GREEDY_CANDIDATES = 1


@dataclass(frozen=True, slots=True)
class Candidates:
    """A step's best tokens of each row, best first. Views of buffers that the next step overwrites."""

    ids: npt.NDArray[np.int64]  # (rows, k)
    log_probabilities: npt.NDArray[np.float32]  # (rows, k)


@dataclass(frozen=True, slots=True)
class Choice:
    """The token that each row takes."""

    ids: npt.NDArray[np.int64]  # (rows,)
    log_probabilities: npt.NDArray[np.float32]  # (rows,)


def greedy(candidates: Candidates) -> Choice:
    """The most probable token of each row."""
    return Choice(candidates.ids[:, 0], candidates.log_probabilities[:, 0])


def endings(batch: Batch, choice: Choice, *, eos_id: int, now: float) -> dict[int, FinishReason]:
    """The rows that end with this choice, in ascending order, and why. Ask before the batch takes the choice.

    The end token wins over the limit of length, and that over the time: what is complete is called so.
    """
    rows = batch.rows
    complete = choice.ids == eos_id
    full = batch.positions[:rows] + 1 >= batch.limits[:rows]
    late = batch.deadlines[:rows] <= now
    ending = (complete | full | late).nonzero()[0].tolist()
    return {row: "stop" if complete[row] else "length" if full[row] else "timeout" for row in ending}
