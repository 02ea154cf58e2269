"""Where rows go when some leave and others branch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.arrangement import Arrangement
from service.sequence import Sequence
from tests.service.fakes import Client

CLIENT = Client()


def _sequences(widths: list[int]) -> tuple[list[Sequence], list[Sequence]]:
    """Some sequences, and of each row its sequence."""
    sequences, rows = [], []
    for width in widths:
        sequence = CLIENT.generate([3], num_beams=8)
        sequence.held = list(range(len(rows), len(rows) + width))
        sequences.append(sequence)
        rows += [sequence] * width
    return sequences, rows


@given(widths=st.lists(st.integers(1, 4), max_size=5), data=st.data())
def test_rows_are_dense_and_every_child_has_its_parents_row(widths: list[int], data: st.DataObject) -> None:
    """Whatever leaves and branches: no place is empty, no place that is written is read for another, and the source's
    state of a place is its sequence's."""
    sequences, rows = _sequences(widths)
    before = {sequence: list(sequence.held) for sequence in sequences}
    move, wanted = Arrangement(rows), {}
    for sequence in sequences:
        width = len(sequence.held)
        parents = data.draw(st.one_of(st.none(), st.lists(st.integers(0, width - 1), min_size=1, max_size=6)))
        if parents is None:
            move.leave(sequence)
        else:
            move.branch(sequence, parents)
            wanted[sequence] = parents
    move.close()
    order = move.order.tolist()
    assert len(order) == len(move.sequences) == sum(map(len, wanted.values()))
    for sequence, parents in wanted.items():
        held = move.held.get(sequence, before[sequence])
        assert [order[place] for place in held] == [before[sequence][parent] for parent in parents]
        assert all(move.sequences[place] is sequence for place in held)
    written = {place for place, row in enumerate(order) if place != row}
    assert written.isdisjoint(row for place, row in enumerate(order) if place != row)
    for place, row in enumerate(order):
        if place not in move.strangers:
            assert rows[place] is rows[row]
    assert move.left == set(sequences) - set(wanted)


def test_nothing_changes_when_everyone_goes_on() -> None:
    """A step of which nothing is to be moved says so."""
    sequences, rows = _sequences([2, 1])
    move = Arrangement(rows)
    move.branch(sequences[0], [0, 1])
    assert not move.close()


def test_beams_that_change_places_only_are_renamed() -> None:
    """Ranks change at almost every step; rows move only when one goes on twice."""
    (sequence,), rows = _sequences([3])
    move = Arrangement(rows)
    move.branch(sequence, [2, 0, 1])
    assert move.close()
    assert move.held[sequence] == [2, 0, 1]
    assert move.order.tolist() == [0, 1, 2]
    move = Arrangement(rows)
    move.branch(sequence, [1, 1, 0])
    move.close()
    assert move.order.tolist() == [0, 1, 1]
    assert not move.strangers, "the same source"
