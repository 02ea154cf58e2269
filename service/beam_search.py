"""Beam search of one sequence: `num_beams` hypotheses go on side by side, and the best that ended win.

As Hugging Face's: each step ranks 2 * num_beams continuations of all hypotheses together, so that num_beams can go on
even if that many end. An ending counts only among the num_beams best of them.
"""

from __future__ import annotations

import math
from operator import itemgetter

from service.hypothesis import Constraints, Continuation, Hypothesis, Outlook
from service.sequence import FinishReason, GenerateParameters, Result


class BeamSearch:
    """Rows are the live hypotheses, in the order of their rank."""

    def __init__(
        self, parameters: GenerateParameters, constraints: Constraints, limit: int, beginning: Hypothesis | None = None
    ) -> None:
        """`limit` bounds the tokens; `beginning` is what all hypotheses begin with, if not with nothing."""
        self._parameters = parameters
        self._constraints = constraints
        self._limit = limit
        self._width = parameters.num_beams
        self._live = [constraints.beginning() if beginning is None else beginning]
        self._ended: list[tuple[float, Hypothesis, FinishReason]] = []  # the best first
        self._certain = 0
        self._prepare()

    @property
    def last_ids(self) -> list[int]:
        """What each row reads next."""
        return [hypothesis.ids[-1] for hypothesis in self._live]

    @property
    def done(self) -> bool:
        """Nothing is left to be tried."""
        return not self._live

    def advance(self, outlook: Outlook) -> list[int]:
        """One step: for each hypothesis that goes on, the row it comes from."""
        ranked: list[tuple[float, int, Continuation]] = []
        for row, (hypothesis, banned) in enumerate(zip(self._live, self._banned, strict=True)):
            best = self._constraints.best(hypothesis, banned, outlook, row, 2 * self._width)
            ranked += [(hypothesis.score + by.score, row, by) for by in best]
        ranked.sort(key=itemgetter(0), reverse=True)  # stable: of equals the better hypothesis first
        live: list[Hypothesis] = []
        parents: list[int] = []
        for rank, (_, row, by) in enumerate(ranked[: 2 * self._width]):
            hypothesis = self._live[row]
            ends, full = self._constraints.ends(hypothesis, by.id), len(hypothesis.ids) + 1 >= self._limit
            if ends or full:
                if rank < self._width:
                    self._end(self._constraints.extended(hypothesis, by), "stop" if ends else "length")
            elif len(live) < self._width:
                live.append(self._constraints.extended(hypothesis, by))
                parents.append(row)
        if not ranked:  # whatever could follow is forbidden
            for hypothesis in self._live:
                if hypothesis.ids:
                    self._end(hypothesis, "stop")
        self._live = live
        if live and self._decided():
            self._live, parents = [], []
        self._prepare()
        return parents

    def certain(self) -> list[tuple[int, int, float]]:
        """What became certain since the last call: (result, token id, log-probability).

        All that can still win share it, so it belongs to every result.
        """
        contenders = [*self._live, *(hypothesis for _, hypothesis, _ in self._ended)]
        if not contenders:
            return []
        first = contenders[0]
        begin = end = self._certain
        shortest = min(len(hypothesis.ids) for hypothesis in contenders)
        while end < shortest and all(hypothesis.ids[end] == first.ids[end] for hypothesis in contenders):
            end += 1
        self._certain = end
        return [
            (result, first.ids[place], first.log_probabilities[place])
            for result in range(self._parameters.num_return_sequences)
            for place in range(begin, end)
        ]

    def results(self) -> list[Result]:
        """The best that ended, best first; where time ran out, those that had not ended compete too."""
        unfinished: list[tuple[float, Hypothesis, FinishReason]] = [
            (self._ranking(hypothesis), hypothesis, "timeout") for hypothesis in self._live if hypothesis.ids
        ]
        best = sorted([*self._ended, *unfinished], key=itemgetter(0), reverse=True)
        if not best:  # there was no time for a token, or every one was forbidden
            return [self._constraints.beginning().result("timeout" if self._live else "stop")]
        return [hypothesis.result(reason) for _, hypothesis, reason in best[: self._parameters.num_return_sequences]]

    def _end(self, hypothesis: Hypothesis, reason: FinishReason) -> None:
        self._ended.append((self._ranking(hypothesis), hypothesis, reason))
        self._ended.sort(key=itemgetter(0), reverse=True)
        del self._ended[self._width :]

    def _decided(self) -> bool:
        """Whether no live hypothesis can push an ended one out any more, or is allowed to."""
        if len(self._ended) < self._width:
            return False
        if self._parameters.early_stopping is True:
            return True
        best, penalty = self._live[0], self._parameters.length_penalty
        # "never" asks what it could reach at best: a positive penalty favours length, so at the longest.
        longest = self._parameters.early_stopping == "never" and penalty > 0
        length = self._limit if longest else len(best.ids)
        return bool(best.score / length**penalty <= self._ended[-1][0])

    def _ranking(self, hypothesis: Hypothesis) -> float:
        ranking: float = hypothesis.score / len(hypothesis.ids) ** self._parameters.length_penalty
        return ranking

    def _prepare(self) -> None:
        """Work out what the next step has to give."""
        self._banned = [self._constraints.forbidden(hypothesis) for hypothesis in self._live]
        self.k, self.wants_logits = self._constraints.needs(self._banned, 2 * self._width)

    def __repr__(self) -> str:
        best = self._ended[0][0] if self._ended else -math.inf
        return f"<BeamSearch {len(self._live)} live, {len(self._ended)} ended, best {best:.3f}>"
