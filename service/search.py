"""Search: which tokens the rows take, and when they are at their end. Knows neither graphs nor buffers.

Plain greedy rows are decided together, as arrays; every other sequence has a search of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from service.batch import Batch
from service.beam_search import BeamSearch
from service.forced import Alternatives, Prefixed
from service.hypothesis import Constraints, Hypothesis, Outlook, SpecialIds
from service.sequence import FinishReason, GenerateParameters, Result
from service.single_path import SinglePaths


class Search(Protocol):
    """The search of one sequence. It begins with one row, and has one for each way that goes on from then on."""

    @property
    def k(self) -> int:
        """Candidates that the next step has to give."""

    @property
    def wants_logits(self) -> bool:
        """Whether the next step has to give all logits."""

    @property
    def last_ids(self) -> list[int]:
        """The token that each row reads next; not asked before the first step."""

    @property
    def done(self) -> bool:
        """Whether it needs no more steps."""

    def advance(self, outlook: Outlook) -> list[int]:
        """Take one step. For each row from now on: which row so far has its state."""

    def certain(self) -> list[tuple[int, int, float]]:
        """What became certain since it was last asked: number of the result, token id, log-probability."""

    def results(self) -> list[Result]:
        """The answers as they stand, best first; what has not ended ends with the reason "timeout"."""


def search_for(parameters: GenerateParameters, special: SpecialIds, max_target_tokens: int) -> Search | None:
    """The search that these parameters ask for, None for plain greedy."""
    if _is_plain(parameters):
        return None
    limit = min(parameters.max_new_tokens, max_target_tokens - len(parameters.prefix_ids))
    constraints = Constraints(parameters, special)
    kind = BeamSearch if parameters.num_beams > 1 else SinglePaths

    def complete(beginning: Hypothesis) -> Search:
        return kind(replace(parameters, num_return_sequences=1), constraints, limit, beginning)

    search: Search
    if parameters.return_alternatives:
        search = Alternatives(parameters, constraints, limit, complete)
    else:
        search = kind(parameters, constraints, limit)
    return Prefixed(parameters.prefix_ids, search) if parameters.prefix_ids else search


def _is_plain(parameters: GenerateParameters) -> bool:
    return (
        parameters.rows == 1
        and not parameters.do_sample
        and parameters.min_new_tokens == 0
        and parameters.repetition_penalty == 1.0
        and parameters.no_repeat_ngram_size == 0
        and parameters.stop is None
        and parameters.suppress is None
        and not parameters.prefix_ids
    )


def endings(batch: Batch, ids: npt.NDArray[np.int64], *, eos_id: int, now: float) -> dict[int, FinishReason]:
    """The plain rows that end by taking these ids (rows,), in ascending order, and why. Ask before they are taken.

    The end token wins over the limit of length, and that over the time: what is complete is called so.
    """
    rows = batch.rows
    complete = ids == eos_id
    full = batch.positions[:rows] + 1 >= batch.limits[:rows]
    late = batch.deadlines[:rows] <= now
    ending = ((complete | full | late) & batch.plain[:rows]).nonzero()[0].tolist()
    return {row: "stop" if complete[row] else "length" if full[row] else "timeout" for row in ending}
