"""Whether a model can be trusted: how many of its calls failed one after another. Knows neither calls nor remedies."""

from __future__ import annotations

from collections import Counter

TOLERATED = 5
"""Failures in a row after which it is not the inputs alone that are suspected, but the model."""


class Health:
    """Of one core, whose thread alone uses it. A call is named by what it is for."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()

    @property
    def suspect(self) -> bool:
        """Whether calls of one name failed so often in a row that the model has to be examined."""
        return any(count >= TOLERATED for count in self._in_a_row.values())

    def failed(self, call: str) -> None:
        """It raised, or nothing of what it gave is a number."""
        self._in_a_row[call] += 1

    def succeeded(self, call: str) -> None:
        """It gave numbers for one input at least: the model is sound, whatever ailed the others."""
        self._in_a_row.pop(call, None)

    def trust(self) -> None:
        """The model was examined and is sound."""
        self._in_a_row.clear()
