"""A hypothesis: one way to go on, and what is known of it. Constraints decide which tokens may follow, and how good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.sequence import FinishReason, GenerateParameters, Result

MOST_BANS = 64
"""With more tokens forbidden than this, all scores are looked at instead of so many more candidates."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The token ids that mean something to a search."""

    bos: int
    eos: int
    never: tuple[int, ...]
    """Never generated: padding and the start."""


class Outlook(NamedTuple):
    """What a step says of some rows: candidates, best first, and all logits if a search asked for them."""

    ids: list[list[int]]  # [rows][k]
    log_probabilities: list[list[float]]  # [rows][k]
    logits: npt.NDArray[np.float32] | None  # (rows, vocabulary)

    def part(self, first: int, last: int) -> Outlook:
        """Rows from `first` up to `last`."""
        logits = None if self.logits is None else self.logits[first:last]
        return Outlook(self.ids[first:last], self.log_probabilities[first:last], logits)


class Continuation(NamedTuple):
    """One token that may follow: what the search thinks of it, and the model's own log-probability."""

    id: int
    score: float
    log_probability: float


class Hypothesis(NamedTuple):
    """Tokens after the prefix."""

    ids: list[int]
    log_probabilities: list[float]
    score: float
    """The sum of the continuations' scores, by which the search ranks."""
    stop_text: bytes
    """The end of its text, as far as a stop string may still begin there."""
    suppress_text: bytes
    """The same for suppressed texts."""

    def result(self, reason: FinishReason) -> Result:
        """As an answer."""
        return Result(self.ids, self.log_probabilities, reason)


class Constraints:
    """What one sequence's parameters make of the model's distribution. Stateless: the history is the hypothesis's.

    Order and meaning are those of Hugging Face's logits processors: repetition penalty, n-grams, forbidden texts,
    least length. A penalty bends log-probabilities in beam search and logits elsewhere.
    """

    def __init__(self, parameters: GenerateParameters, special: SpecialIds) -> None:
        self._parameters = parameters
        self._special = special
        self._before = [special.bos, *parameters.prefix_ids]
        self._wants_logits = parameters.repetition_penalty != 1.0
        self._forbids = bool(
            parameters.min_new_tokens or parameters.no_repeat_ngram_size or parameters.suppress is not None
        )

    def beginning(self) -> Hypothesis:
        """Nothing said yet."""
        suppress = self._parameters.suppress
        text = b"" if suppress is None else suppress.text_of(self._parameters.prefix_ids)
        return Hypothesis([], [], 0.0, b"", text)

    def extended(self, hypothesis: Hypothesis, by: Continuation) -> Hypothesis:
        """The hypothesis with one token more."""
        stop, suppress = self._parameters.stop, self._parameters.suppress
        return Hypothesis(
            [*hypothesis.ids, by.id],
            [*hypothesis.log_probabilities, by.log_probability],
            hypothesis.score + by.score,
            b"" if stop is None else stop.extend(hypothesis.stop_text, by.id),
            b"" if suppress is None else suppress.extend(hypothesis.suppress_text, by.id),
        )

    def ends(self, hypothesis: Hypothesis, id: int) -> bool:
        """Whether the hypothesis is complete with this token."""
        stop = self._parameters.stop
        return id == self._special.eos or (stop is not None and stop.completed_by(hypothesis.stop_text, id))

    def forbidden(self, hypothesis: Hypothesis) -> frozenset[int]:
        """Tokens that must not follow."""
        if not self._forbids:
            return _NOTHING
        parameters, banned = self._parameters, set[int]()
        if len(hypothesis.ids) < parameters.min_new_tokens:
            banned.add(self._special.eos)
        if parameters.no_repeat_ngram_size:
            banned.update(_repeating([*self._before, *hypothesis.ids], parameters.no_repeat_ngram_size))
        if parameters.suppress is not None:
            banned.update(parameters.suppress.completing(hypothesis.suppress_text))
        return frozenset(banned)

    def best(
        self, hypothesis: Hypothesis, banned: frozenset[int], outlook: Outlook, row: int, count: int
    ) -> list[Continuation]:
        """The `count` best continuations, best first; fewer if no more are possible. Of equals the lower id first.

        What a row is given depends on its own needs alone, not on what the other rows of the batch made the step give.
        """
        if self.needs_logits(banned):
            assert outlook.logits is not None
            scores, values = self.scores(hypothesis, banned, outlook.logits[row])
            return [Continuation(id, float(scores[id]), float(values[id])) for id in largest(scores, count)]
        if not banned and (first := outlook.log_probabilities[row][:count])[-1] != -np.inf:
            return list(map(Continuation, outlook.ids[row], first, first))
        found: list[Continuation] = []
        for id, value in zip(outlook.ids[row], outlook.log_probabilities[row], strict=True):
            if id not in banned and value != -np.inf:
                found.append(Continuation(id, value, value))
                if len(found) == count:
                    break
        return found

    def needs(self, banned: list[frozenset[int]], count: int) -> tuple[int, bool]:
        """How many candidates a step has to give for `count` continuations of each row, and whether all logits too."""
        few = [len(ids) for ids in banned if not self.needs_logits(ids)]
        return (count + max(few) if few else 1), len(few) < len(banned)

    def needs_logits(self, banned: frozenset[int]) -> bool:
        """Whether candidates are not enough for a row."""
        return self._wants_logits or len(banned) > MOST_BANS

    def scores(
        self, hypothesis: Hypothesis, banned: frozenset[int], logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Of every token what the search thinks of it, -inf if it must not follow, and its log-probability."""
        wide = logits.astype(np.float64)
        log_probabilities = wide - wide.max()
        log_probabilities -= np.log(np.exp(log_probabilities).sum())
        penalty = self._parameters.repetition_penalty
        scores = log_probabilities.copy() if self._parameters.num_beams > 1 else wide
        if penalty != 1.0:
            said = np.unique([*self._before, *hypothesis.ids])
            scores[said] = np.where(scores[said] < 0, scores[said] * penalty, scores[said] / penalty)
        scores[[*self._special.never, *banned]] = -np.inf
        return scores, log_probabilities


def _repeating(history: list[int], size: int) -> Iterable[int]:
    """The tokens that would make an n-gram of this size occur again."""
    if size == 1:
        return history
    last = history[len(history) - size + 1 :]
    starts = range(len(history) - size + 1) if len(last) == size - 1 else ()
    return (history[start + size - 1] for start in starts if history[start : start + size - 1] == last)


def largest(scores: npt.NDArray[np.float64], count: int) -> list[int]:
    """Indices of the `count` largest values above -inf, largest first, of equals the lower index first."""
    if count < len(scores):
        bound = np.partition(scores, -count)[-count]
        indices = np.flatnonzero((scores >= bound) & (scores > -np.inf))
    else:
        indices = np.flatnonzero(scores > -np.inf)
    chosen: list[int] = indices[np.argsort(-scores[indices], kind="stable")][:count].tolist()
    return chosen


_NOTHING: frozenset[int] = frozenset()
