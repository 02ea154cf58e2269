"""How many values a JSON text spells, found out without making any of them.

Eight megabytes of `{},{},...` become 200 MB of Python's objects, and its garbage collector looks at them again and
again: a body is counted before it is parsed.
"""

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 18
"""Bytes that are looked at together: what that takes stays in the processor's cache."""

_BEGINS_A_VALUE = np.isin(np.arange(256), list(b",[{"))
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def spells_more_values_than(limit: int, text: bytes) -> bool:
    """Whether there are more commas and opening brackets than that outside of texts, each of which begins a value or
    adds one. Of what is no JSON, up to where it is none.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) <= limit:
        return False
    count, odd, inside = 0, False, False
    for start in range(0, len(text), _PIECE):
        piece = np.frombuffer(text, np.uint8, min(_PIECE, len(text) - start), start)
        odd_run = _ends_odd_run(piece == _BACKSLASH, odd)
        escaped = np.concatenate(([odd], odd_run[:-1]))
        quotes = (piece == _QUOTE) & ~escaped
        texts = (
            np.cumsum(quotes, dtype=np.int32) + inside
        ) & 1 == 1  # from each opening quote to before the closing one
        count += int(np.count_nonzero(_BEGINS_A_VALUE[piece] & ~texts))
        if count > limit:
            return True
        odd, inside = bool(odd_run[-1]), bool(texts[-1])
    return False


def _ends_odd_run(backslash: NDArray[np.bool_], before: bool) -> NDArray[np.bool_]:
    """Where a run of backslashes has an odd length so far: what follows such a place is escaped. `before` says it of
    the place before the first.
    """
    place = np.arange(len(backslash), dtype=np.int32)
    other = np.maximum.accumulate(np.where(backslash, np.int32(-1), place))  # the last place that is none
    length = place - other + (before & (other < 0))
    return (length & 1).astype(np.bool_)
