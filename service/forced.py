"""Searches whose beginning is given: a prefix that is forced, and alternatives to the first token after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from service.hypothesis import Constraints, Hypothesis, Outlook
from service.sequence import GenerateParameters, Result

if TYPE_CHECKING:
    from service.search import Search


class Prefixed:
    """One row reads the prefix, token by token; then the search begins."""

    def __init__(self, prefix_ids: tuple[int, ...], search: Search) -> None:
        self._left = list(reversed(prefix_ids))
        self._last = -1
        self._search = search

    @property
    def k(self) -> int:
        """While the prefix is read nothing is asked."""
        return 1 if self._left else self._search.k

    @property
    def wants_logits(self) -> bool:
        """The same."""
        return not self._left and self._search.wants_logits

    @property
    def last_ids(self) -> list[int]:
        """What each row reads next."""
        return self._search.last_ids if self._last < 0 else [self._last]

    @property
    def done(self) -> bool:
        """As the search is."""
        return self._search.done

    def advance(self, outlook: Outlook) -> list[int]:
        """One step, of the prefix or of the search."""
        if self._left:
            self._last = self._left.pop()
            return [0]
        self._last = -1
        return self._search.advance(outlook)

    def certain(self) -> list[tuple[int, int, float]]:
        """The prefix is not part of what is generated."""
        return self._search.certain()

    def results(self) -> list[Result]:
        """The search's."""
        return self._search.results()


class Alternatives:
    """The `num_return_sequences` best first tokens, each completed by a search of its own."""

    def __init__(
        self,
        parameters: GenerateParameters,
        constraints: Constraints,
        limit: int,
        complete: Callable[[Hypothesis], Search],
    ) -> None:
        self._count = parameters.num_return_sequences
        self._constraints = constraints
        self._limit = limit
        self._complete = complete
        self._beginning = constraints.beginning()
        self._banned = constraints.forbidden(self._beginning)
        self._at_once: dict[int, Result] = {}  # alternatives that end with their first token
        self._searches: dict[int, Search] = {}  # by number of the alternative
        self._told: set[int] = set()
        self._begun = False

    @property
    def k(self) -> int:
        """As many as the most demanding search wants."""
        if not self._begun:
            return self._constraints.needs([self._banned], self._count)[0]
        return max((search.k for search in self._going), default=1)

    @property
    def wants_logits(self) -> bool:
        """If one search does."""
        if not self._begun:
            return self._constraints.needs_logits(self._banned)
        return any(search.wants_logits for search in self._going)

    @property
    def last_ids(self) -> list[int]:
        """What each row reads next: the rows of one search after those of another."""
        return [id for search in self._going for id in search.last_ids]

    @property
    def done(self) -> bool:
        """All alternatives are complete."""
        return self._begun and not self._going

    def advance(self, outlook: Outlook) -> list[int]:
        """One step of each, the first one of all together."""
        if not self._begun:
            return self._begin(outlook)
        parents: list[int] = []
        first = 0
        for search in self._going:
            rows = len(search.last_ids)
            parents += [first + parent for parent in search.advance(outlook.part(first, first + rows))]
            first += rows
        return parents

    def certain(self) -> list[tuple[int, int, float]]:
        """What became certain of each alternative."""
        told = [
            (number, id, log_probability)
            for number, search in self._searches.items()
            for _, id, log_probability in search.certain()
        ]
        for number, result in self._at_once.items():
            if number not in self._told:
                self._told.add(number)
                told += [(number, *pair) for pair in zip(result.ids, result.log_probabilities, strict=True)]
        return told

    def results(self) -> list[Result]:
        """The best of each alternative, the most probable first token first; an empty one if there is none."""
        numbers = sorted([*self._at_once, *self._searches])
        if not numbers:  # there was no time for a token, or every one was forbidden
            return [self._beginning.result("stop" if self._begun else "timeout")]
        return [self._at_once[n] if n in self._at_once else self._searches[n].results()[0] for n in numbers]

    @property
    def _going(self) -> list[Search]:
        return [search for search in self._searches.values() if not search.done]

    def _begin(self, outlook: Outlook) -> list[int]:
        self._begun = True
        best = self._constraints.best(self._beginning, self._banned, outlook, 0, self._count)
        for number, by in enumerate(best):
            hypothesis = self._constraints.extended(self._beginning, by)
            ends = self._constraints.ends(self._beginning, by.id)
            if ends or self._limit == 1:
                self._at_once[number] = hypothesis.result("stop" if ends else "length")
            else:
                self._searches[number] = self._complete(hypothesis)
        return [0] * len(self._searches)
