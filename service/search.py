"""Search: which token each row takes, and which rows are at their end. Works on candidates (rows, k)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.batch import Batch
from service.sequence import FinishReason

GREEDY_CANDIDATES = 1

RUNNING, STOP, LENGTH, TIMEOUT = range(4)
REASONS: dict[int, FinishReason] = {STOP: "stop", LENGTH: "length", TIMEOUT: "timeout"}
"""What `endings` writes, and its name."""


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


def endings(batch: Batch, choice: Choice, *, eos_id: int, now: float) -> npt.NDArray[Any]:
    """(rows,): why each row ends with this choice, RUNNING if it does not. Ask before the batch takes the choice.

    The end token wins over the limit of length, and that over the time: what is complete is called so.
    """
    rows = batch.rows
    codes = np.where(batch.deadlines[:rows] <= now, TIMEOUT, RUNNING)
    codes[batch.positions[:rows] + 1 >= batch.limits[:rows]] = LENGTH
    codes[choice.ids == eos_id] = STOP
    return codes
