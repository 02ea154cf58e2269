"""Where rows go when some leave and others go on more than once: dense at the front again, with as few moves as can be.

A row from which something goes on keeps its place for one of its continuations; the others take places that the
sequence does not need any more, or new ones at the end; then the last rows fill what gaps are left. So no place that is
written is read for another: the moves may be done one by one, in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from service.sequence import Sequence

_GAP = -1


class Arrangement:
    """The next order of a batch's rows. Ask for changes, then `close`; nothing moves until it is carried out."""

    def __init__(self, sequences: list[Sequence]) -> None:
        """`sequences`: of each row the sequence that holds it."""
        self.sequences = list(sequences)
        """Of each place the sequence, once it is closed."""
        self.held: dict[Sequence, list[int]] = {}
        """The places of the sequences whose rows changed."""
        self.left: set[Sequence] = set()
        """The sequences that hold no row any more."""
        self.order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        """Entry i is the row that comes to place i; may be longer or shorter than the batch was."""
        self.strangers: set[int] = set()
        """Places that get a row of another source than they held: only there the source's state has to move too."""
        self._origin = list(range(len(sequences)))  # of each place the row that comes there

    def leave(self, sequence: Sequence) -> None:
        """It gives up its rows."""
        self.left.add(sequence)
        self._free(sequence.held)

    def branch(self, sequence: Sequence, parents: list[int]) -> None:
        """It goes on in one row for each of `parents`, which says of which of its rows, counted from 0."""
        held = sequence.held
        if parents == list(range(len(held))):
            return
        kept: set[int] = set()
        places = [_GAP] * len(parents)
        for child, parent in enumerate(parents):
            if parent not in kept:
                kept.add(parent)
                places[child] = held[parent]
        spare = [place for row, place in enumerate(held) if row not in kept]
        for child, parent in enumerate(parents):
            if places[child] != _GAP:
                continue
            if spare:
                place = spare.pop()
                self._origin[place] = held[parent]
            else:
                place = len(self._origin)
                self._origin.append(held[parent])
                self.sequences.append(sequence)
                self.strangers.add(place)
            places[child] = place
        self._free(spare)
        self.held[sequence] = places

    def close(self) -> bool:
        """Fill the gaps; whether anything changes at all."""
        origin = self._origin
        gaps = [place for place, row in enumerate(origin) if row == _GAP]
        changes = bool(gaps or self.held)
        for gap in gaps:
            while origin and origin[-1] == _GAP:
                self._drop_last()
            if gap >= len(origin):
                break
            last = len(origin) - 1
            sequence = self.sequences[last]
            held = self.held.setdefault(sequence, list(sequence.held))
            held[held.index(last)] = gap
            origin[gap] = origin[last]
            self.sequences[gap] = sequence
            self.strangers.add(gap)
            self._drop_last()
        self.order = np.array(origin, np.int64)
        return changes

    def _free(self, places: list[int]) -> None:
        for place in places:
            self._origin[place] = _GAP

    def _drop_last(self) -> None:
        self._origin.pop()
        self.sequences.pop()
        self.strangers.discard(len(self._origin))
