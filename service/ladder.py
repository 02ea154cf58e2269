"""A ladder of lengths: what varies is rounded up to few sizes, so that shapes recur and memory does not creep."""

from __future__ import annotations

import bisect

_ROUND = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


class Ladder:
    """Rungs in ascending order; the last one is the longest length allowed."""

    def __init__(self, rungs: list[int]) -> None:
        if not rungs or rungs[0] < 1 or sorted(set(rungs)) != rungs:
            raise ValueError(f"rungs have to ascend from 1 or more: {rungs}")
        self.rungs = rungs

    @classmethod
    def of_lengths(cls, longest: int) -> Ladder:
        """Fine rungs, to pad to: at most a third of a padded text is padding, beyond the first rung."""
        return cls([*(rung for rung in _ROUND if rung < longest), longest])

    @classmethod
    def of_capacities(cls, longest: int, smallest: int = 32) -> Ladder:
        """Coarse rungs, to allocate by: climbing one is a copy, and each doubles the last."""
        rungs = []
        while smallest < longest:
            rungs.append(smallest)
            smallest *= 2
        return cls([*rungs, longest])

    @classmethod
    def of_counts(cls, most: int) -> Ladder:
        """Powers of two: numbers of which a few more do not matter."""
        return cls([*(1 << power for power in range(most.bit_length()) if 1 << power < most), most])

    @property
    def first(self) -> int:
        """The lowest rung."""
        return self.rungs[0]

    @property
    def last(self) -> int:
        """The highest rung."""
        return self.rungs[-1]

    def rung(self, length: int) -> int:
        """The lowest rung that holds `length`. Raises ValueError above the last."""
        place = bisect.bisect_left(self.rungs, length)
        if place == len(self.rungs):
            raise ValueError(f"length {length} is above the last rung {self.last}")
        return self.rungs[place]

    def __repr__(self) -> str:
        return f"<Ladder {self.first} to {self.last}, {len(self.rungs)} rungs>"
