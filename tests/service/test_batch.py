"""The host's books of the running rows, and the choice of tokens."""

from __future__ import annotations

import math

import numpy as np

from service.batch import Batch, pad
from service.search import endings
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
    batch.clear()
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


def test_each_row_ends_for_its_own_reason() -> None:
    """The end token before the limit, the limit before the time; who goes on is not named."""
    batch = _batch(
        CLIENT.generate([5], 1),
        CLIENT.generate([5], 1, deadline=0.0),
        CLIENT.generate([5], 2, deadline=0.0),
        CLIENT.generate([5], 2, deadline=9.0),
    )
    assert endings(batch, np.array([EOS, 5, 5, 5]), eos_id=EOS, now=1.0) == {0: "stop", 1: "length", 2: "timeout"}
