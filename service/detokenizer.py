"""Token ids to the text of a result, at once or piece by piece: it begins with the prefix, is cut at a stop string, and
no piece ever holds half a character.

Stop strings are looked for in bytes, as the engine does (`service.patterns`), so that a cut is where the engine saw it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class Detokenizer:
    """How every result of one request becomes text. Joined, its pieces are what `text` gives."""

    def __init__(self, token_bytes: list[bytes], prefix: str = "", stop: Sequence[bytes] = ()) -> None:
        """`token_bytes` has the bytes of every token id, `stop` the texts of which the first to occur ends a result."""
        self._token_bytes = token_bytes
        self._prefix = prefix
        self._stop = tuple(stop)

    def text(self, ids: Iterable[int]) -> str:
        """The whole text of a result."""
        spelt = b"".join(map(self._token_bytes.__getitem__, ids))
        if self._stop and (cut := first_occurrence(spelt, self._stop)) is not None:
            spelt = spelt[:cut]
        return self._prefix + spelt.decode("utf-8", errors="replace")

    def pieces(self) -> Pieces:
        """A new incremental decoder, for the stream of one result."""
        return Pieces(self._token_bytes, self._prefix, StopFilter(self._stop) if self._stop else None)


class Pieces:
    """One result's text while its tokens come."""

    def __init__(self, token_bytes: list[bytes], prefix: str, stop_filter: StopFilter | None) -> None:
        self._token_bytes = token_bytes
        self._stop_filter = stop_filter
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unsaid = prefix
        self.count = 0
        """Ids that were pushed."""

    def push(self, ids: Sequence[int]) -> str:
        """What became certain by these ids; may be empty. The first piece brings the prefix."""
        self.count += len(ids)
        spelt = b"".join(map(self._token_bytes.__getitem__, ids))
        if self._stop_filter is not None:
            spelt = self._stop_filter.push(spelt)
        return self._after_prefix(self._decoder.decode(spelt))

    def finish(self) -> str:
        """What is left; a character that never got complete becomes U+FFFD."""
        spelt = b"" if self._stop_filter is None else self._stop_filter.finish()
        return self._after_prefix(self._decoder.decode(spelt, final=True))

    def _after_prefix(self, text: str) -> str:
        unsaid, self._unsaid = self._unsaid, ""
        return unsaid + text


class StopFilter:
    """Passes bytes on up to the first stop string; what may be the beginning of one is held back until it is known."""

    def __init__(self, stop: Sequence[bytes]) -> None:
        self._stop = stop
        self._longest = max(map(len, stop))
        self._held = b""
        self._ended = False

    def push(self, more: bytes) -> bytes:
        """What of these bytes, and of those held back, is certain to come before any stop string."""
        if self._ended:
            return b""
        held = self._held + more
        if (cut := first_occurrence(held, self._stop)) is not None:
            self._ended, self._held = True, b""
            return held[:cut]
        kept = self._beginning_at_the_end_of(held)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def finish(self) -> bytes:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, b""
        return held

    def _beginning_at_the_end_of(self, text: bytes) -> int:
        """How many bytes at the end of `text` may be the beginning of a stop string: the most that may."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            ending = text[start:]
            if any(one.startswith(ending) for one in self._stop):
                return len(ending)
        return 0


def first_occurrence(text: bytes, stop: Iterable[bytes]) -> int | None:
    """Where the first of the stop strings begins in `text`; None if none of them is in it."""
    found = [place for one in stop if (place := text.find(one)) >= 0]
    return min(found, default=None)
