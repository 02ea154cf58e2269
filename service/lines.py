"""Lines of text from bytes, for `transduce translate`: one line of input is one text, whatever is in it.

A line ends at a line feed (a carriage return before it belongs to the end), and nowhere else: the separators that
Python's `splitlines` knows besides are part of the text. Bytes that are not UTF-8 become U+FFFD.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

MAX_LINE_BYTES = 1 << 20
"""What is kept of a line; far more than any model takes, and a bound on memory for a file without line feeds."""


@dataclass(frozen=True)
class Line:
    """One line without its end. `number` counts from 1; `cut` says that it was longer than MAX_LINE_BYTES."""

    number: int
    text: str
    cut: bool


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """The lines of a stream; the last one need not end."""
    number = 0
    while piece := stream.readline(MAX_LINE_BYTES):
        number += 1
        cut = False
        if len(piece) == MAX_LINE_BYTES and not piece.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                cut = True
            cut = cut or rest not in (b"", b"\n")
        text = piece.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", errors="replace")
        yield Line(number, text, cut)


def as_one_line(text: str) -> str:
    """A generated text on one line, so that there are as many lines out as in."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
