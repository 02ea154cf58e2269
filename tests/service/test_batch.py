"""The host's books of the running rows, and the choice of tokens."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.batch import Batch, pad
from service.search import Candidates, Choice, endings, greedy
from service.sequence import Sequence
from tests.service.fakes import BOS, EOS, PAD, Client

CLIENT = Client()


def _batch(*sequences: Sequence) -> Batch:
    batch = Batch(max_rows=8, max_target_tokens=6, bos_id=BOS)
    batch.append(list(sequences))
    return batch


def test_sources_are_padded_to_the_given_length() -> None:
    """Ids, and the true lengths beside them."""
    ids, lengths = pad([[5, 6, 2], [2]], 4, PAD)
    assert ids.tolist() == [[5, 6, 2, PAD], [2, PAD, PAD, PAD]]
    assert lengths.tolist() == [3, 1]
    assert ids.dtype == lengths.dtype == np.int64
    assert ids.flags.c_contiguous


def test_a_row_begins_with_the_start_token_at_position_0() -> None:
    """Whatever the row held before."""
    batch = _batch(CLIENT.generate([5, 2], 3, deadline=7.5))
    batch.take(np.array([9]), np.array([-0.5], np.float32))
    batch.keep(np.empty(0, np.int64))
    batch.append([CLIENT.generate([5, 6, 2], 4, stream=True)])
    assert batch.last_ids[0] == BOS
    assert (batch.positions[0], batch.source_lengths[0], batch.limits[0]) == (0, 3, 4)
    assert math.isinf(batch.deadlines[0])
    assert batch.streams[0]
    assert batch.result(0) == ([], [])


def test_a_result_is_what_the_row_took() -> None:
    """In order, as plain numbers."""
    batch = _batch(CLIENT.generate([5, 2]), CLIENT.generate([6, 2]))
    batch.take(np.array([9, 8]), np.array([-0.5, -1.0], np.float32))
    batch.take(np.array([7, 2]), np.array([-0.25, -2.0], np.float32))
    assert batch.result(1) == ([8, 2], [-1.0, -2.0])
    assert batch.last_ids[:2].tolist() == [7, 2]


@given(rows=st.integers(1, 8), data=st.data())
def test_gaps_are_filled_by_the_last_rows(rows: int, data: st.DataObject) -> None:
    """Who stays, stays; who has to move is behind the new end; and all arrays tell the same."""
    sequences = [CLIENT.generate([3] * length, length) for length in range(1, rows + 1)]
    batch = _batch(*sequences)
    batch.take(np.arange(10, 10 + rows), np.zeros(rows, np.float32))
    leaving = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    order = batch.without(leaving)
    assert sorted(order.tolist()) == [row for row in range(rows) if row not in leaving]
    assert all(new == old or old >= len(order) for new, old in enumerate(order.tolist()))
    batch.keep(order)
    assert batch.rows == len(order) == len(batch.sequences)
    for row, old in enumerate(order.tolist()):
        assert batch.sequences[row] is sequences[old]
        assert sequences[old].row == row
        assert batch.source_lengths[row] == batch.limits[row] == old + 1
        assert batch.result(row)[0] == [10 + old] == [batch.last_ids[row]]


def test_greedy_takes_the_first_candidate() -> None:
    """Candidates come best first."""
    choice = greedy(Candidates(np.array([[5, 6], [7, 8]]), np.array([[-1.0, -2.0], [-0.5, -3.0]], np.float32)))
    assert choice.ids.tolist() == [5, 7]
    assert choice.log_probabilities.tolist() == [-1.0, -0.5]


def test_each_row_ends_for_its_own_reason() -> None:
    """The end token before the limit, the limit before the time; who goes on is not named."""
    batch = _batch(
        CLIENT.generate([5], 1),
        CLIENT.generate([5], 1, deadline=0.0),
        CLIENT.generate([5], 2, deadline=0.0),
        CLIENT.generate([5], 2, deadline=9.0),
    )
    ids = np.array([EOS, 5, 5, 5])
    choice = Choice(ids, np.zeros(4, np.float32))
    assert endings(batch, choice, eos_id=EOS, now=1.0) == {0: "stop", 1: "length", 2: "timeout"}
