"""Lengths are rounded up to few sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ladder import Ladder


@given(st.integers(1, 9000), st.data())
def test_a_rung_holds_the_length_and_the_one_below_does_not(longest: int, data: st.DataObject) -> None:
    """The rung of a length is the lowest that holds it, and none is above the longest length allowed."""
    ladder = Ladder.of_lengths(longest)
    length = data.draw(st.integers(1, longest))
    rung = ladder.rung(length)
    assert length <= rung <= longest
    assert all(other < length for other in ladder.rungs if other < rung)


def test_the_longest_length_is_the_last_rung() -> None:
    """No text is padded beyond what the model takes."""
    assert Ladder.of_lengths(512).rungs == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert Ladder.of_lengths(50).rungs == [8, 16, 24, 32, 48, 50]
    assert Ladder.of_lengths(5).rungs == [5]
    assert Ladder.of_capacities(256).rungs == [32, 64, 128, 256]
    assert Ladder.of_capacities(100).rungs == [32, 64, 100]
    assert Ladder.of_capacities(10).rungs == [10]
    assert repr(Ladder([2, 4])) == "<Ladder 2 to 4, 2 rungs>"


def test_above_the_last_rung_and_out_of_order_are_errors() -> None:
    """Nothing is rounded down in silence."""
    with pytest.raises(ValueError, match="above the last rung 4"):
        Ladder([2, 4]).rung(5)
    for rungs in ([], [0, 1], [2, 2], [3, 2]):
        with pytest.raises(ValueError, match="ascend"):
            Ladder(rungs)
