"""How many values a JSON text spells and how deep they nest, found out without making any of them.

Eight megabytes of `{},{},...` become 200 MB of Python's objects, and its garbage collector looks at them again and
again; a hundred thousand opening brackets exhaust a parser's stack. So a body is looked at before it is parsed.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 18
"""Bytes that are looked at together: what that takes stays in the processor's cache."""

_ADDS = np.isin(np.arange(256), list(b",[{"))
"""What begins a value or adds one."""

_DEEPER = np.zeros(256, np.int8)
_DEEPER[list(b"[{")], _DEEPER[list(b"]}")] = 1, -1

_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def exceeded(text: bytes, *, max_depth: int, max_values: int) -> Literal["depth", "values"] | None:
    """Which of the limits a text exceeds, if any. Values are counted by commas and opening brackets outside of texts;
    `max_depth` is of lists and objects in one another. Of what is no JSON all is said up to where it is none.
    """
    brackets = text.count(b"[") + text.count(b"{")
    if brackets <= max_depth and brackets + text.count(b",") <= max_values:
        return None
    values, depth, odd, inside = 0, 0, False, False
    for start in range(0, len(text), _PIECE):
        piece = np.frombuffer(text, np.uint8, min(_PIECE, len(text) - start), start)
        odd_run = _ends_odd_run(piece == _BACKSLASH, odd)
        quotes = (piece == _QUOTE) & ~np.concatenate(([odd], odd_run[:-1]))
        # From each opening quote to before the closing one.
        texts = (np.cumsum(quotes, dtype=np.int32) + inside) & 1 == 1
        depths = np.cumsum(_DEEPER[piece] * ~texts, dtype=np.int32) + depth
        if depths.max() > max_depth:
            return "depth"
        values += int(np.count_nonzero(_ADDS[piece] & ~texts))
        if values > max_values:
            return "values"
        depth, odd, inside = int(depths[-1]), bool(odd_run[-1]), bool(texts[-1])
    return None


def _ends_odd_run(backslash: NDArray[np.bool_], before: bool) -> NDArray[np.bool_]:
    """Where a run of backslashes has an odd length so far: what follows such a place is escaped. `before` says it of
    the place before the first.
    """
    place = np.arange(len(backslash), dtype=np.int32)
    other = np.maximum.accumulate(np.where(backslash, np.int32(-1), place))  # the last place that is none
    length = place - other + (before & (other < 0))
    return (length & 1).astype(np.bool_)
