"""Texts of one sequence that go on each by itself: greedy under constraints, or sampled, one or several.

A sampled text takes one random number per token from a generator of its own, made of the seed and the text's number,
so it depends on nothing else that runs.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from service.hypothesis import Constraints, Continuation, Hypothesis, Outlook, largest
from service.sequence import FinishReason, GenerateParameters, Result

MOST_CANDIDATES = 128
"""A top_k above this is taken from all scores: so many candidates of every row of the batch would cost more."""


class SinglePaths:
    """Rows are the texts that have not ended. All begin in one row and part at the first step."""

    def __init__(
        self, parameters: GenerateParameters, constraints: Constraints, limit: int, beginning: Hypothesis | None = None
    ) -> None:
        """`limit` bounds the tokens; `beginning` is what the texts begin with, if not with nothing."""
        self._constraints = constraints
        self._limit = limit
        count = parameters.num_return_sequences
        self._texts = [constraints.beginning() if beginning is None else beginning] * count
        self._reasons: list[FinishReason | None] = [None] * count
        self._going = list(range(count))  # the texts that have not ended
        self._rows = [0] * count  # of each of those its row
        self._told = [0] * count  # tokens of each text that were called certain
        self._sampler = Sampler(parameters, count) if parameters.do_sample else None
        self._prepare()

    @property
    def last_ids(self) -> list[int]:
        """What each row reads next."""
        return [self._texts[text].ids[-1] for text in self._going]

    @property
    def done(self) -> bool:
        """Every text has ended."""
        return not self._going

    def advance(self, outlook: Outlook) -> list[int]:
        """One step: for each text that goes on, the row it comes from."""
        going, parents = [], []
        for text, row in zip(self._going, self._rows, strict=True):
            hypothesis, banned = self._texts[text], self._banned[row]
            by = self._choose(text, hypothesis, banned, outlook, row)
            if by is None:  # everything is forbidden
                self._reasons[text] = "stop"
                continue
            ends = self._constraints.ends(hypothesis, by.id)
            self._texts[text] = extended = self._constraints.extended(hypothesis, by)
            if ends:
                self._reasons[text] = "stop"
            elif len(extended.ids) >= self._limit:
                self._reasons[text] = "length"
            else:
                going.append(text)
                parents.append(row)
        self._going = going
        self._rows = list(range(len(going)))
        self._prepare()
        return parents

    def certain(self) -> list[tuple[int, int, float]]:
        """What was added since the last call: (result, token id, log-probability)."""
        added: list[tuple[int, int, float]] = []
        for text, hypothesis in enumerate(self._texts):
            new = slice(self._told[text], None)
            pairs = zip(hypothesis.ids[new], hypothesis.log_probabilities[new], strict=True)
            added += [(text, id, value) for id, value in pairs]
            self._told[text] = len(hypothesis.ids)
        return added

    def results(self) -> list[Result]:
        """Every text, in the order of their numbers."""
        return [
            text.result("timeout" if reason is None else reason)
            for text, reason in zip(self._texts, self._reasons, strict=True)
        ]

    def _choose(
        self, text: int, hypothesis: Hypothesis, banned: frozenset[int], outlook: Outlook, row: int
    ) -> Continuation | None:
        if self._sampler is None:
            return next(iter(self._constraints.best(hypothesis, banned, outlook, row, 1)), None)
        if self._sampler.all_scores or self._constraints.needs_logits(banned):
            assert outlook.logits is not None
            scores, log_probabilities = self._constraints.scores(hypothesis, banned, outlook.logits[row])
            id = self._sampler.draw_from_all(text, scores)
            return None if id is None else Continuation(id, float(scores[id]), float(log_probabilities[id]))
        best = self._constraints.best(hypothesis, banned, outlook, row, self._sampler.top_k)
        return best[self._sampler.draw(text, np.array([by.score for by in best]))] if best else None

    def _prepare(self) -> None:
        """Work out what the next step has to give."""
        begun = {row: self._texts[text] for text, row in zip(self._going, self._rows, strict=True)}
        self._banned = [self._constraints.forbidden(begun[row]) for row in sorted(begun)]
        sampler = self._sampler
        count = 1 if sampler is None or sampler.all_scores else sampler.top_k
        self.k, self.wants_logits = self._constraints.needs(self._banned, count)
        self.wants_logits |= sampler is not None and sampler.all_scores

    def __repr__(self) -> str:
        return f"<SinglePaths {len(self._going)} of {len(self._texts)} going on>"


class Sampler:
    """Draws tokens: temperature, then the top_k best, then of those the fewest that hold top_p of the probability."""

    def __init__(self, parameters: GenerateParameters, count: int) -> None:
        seed = secrets.randbits(63) if parameters.seed is None else parameters.seed
        self._generators = [np.random.Generator(np.random.Philox(key=[seed, text])) for text in range(count)]
        self._temperature = parameters.temperature
        self._top_p = parameters.top_p
        self.top_k = parameters.top_k
        self.all_scores = not 0 < parameters.top_k <= MOST_CANDIDATES
        """Whether it wants every token's score instead of the best `top_k`."""

    def draw(self, text: int, scores: npt.NDArray[np.float64]) -> int:
        """The place of a token among candidates (n,), which are sorted, best first, if top_p is to choose of them."""
        weights = np.exp((scores - scores.max()) / self._temperature)
        total = np.cumsum(weights)
        if self._top_p < 1.0:
            # A token stays as long as those before it do not hold top_p yet.
            kept = int(np.searchsorted(total - weights, self._top_p * total[-1], side="left"))
            total = total[: max(kept, 1)]
        place = int(np.searchsorted(total, self._generators[text].random() * total[-1], side="right"))
        return min(place, len(total) - 1)

    def draw_from_all(self, text: int, scores: npt.NDArray[np.float64]) -> int | None:
        """A token's id by the scores of all (vocabulary,); None if all are forbidden."""
        if self._top_p < 1.0 or self.top_k:
            ids = np.array(largest(scores, self.top_k or len(scores)), np.int64)
        else:  # any order will do
            ids = np.flatnonzero(scores > -np.inf)
        return int(ids[self.draw(text, scores[ids])]) if ids.size else None
