"""Large answers: how many bytes of them there are, and in which pieces they are sent.

A small request can ask for a hundred megabytes, and a client that takes them slowly keeps them here. So room is asked
for before the work is done, and an answer goes out no faster than it is taken.
"""

from collections.abc import Iterator

from service.errors import QueueFull, TooLarge
from service.trail import Trail

PIECE_BYTES = 64 * 1024
"""An answer up to this is left to its connection; what is larger is large."""

PATIENCE_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 128 * 1024
"""A client may be waited for so long, and a second for so many bytes, with a large answer: others want its room."""

NUMBER_BYTES = 17
"""A float32 and how JSON spells it, with a comma."""

BASE64_NUMBER_BYTES = 10
"""A float32 and its part of a base64 text."""

TOKEN_BYTES = 16
"""A token's part of a text."""

DESCRIBED_TOKEN_BYTES = 160
"""The id, the text and the log-probability of a token, by itself and again in the answer that is put together; or the
event that tells of it."""


class LargeAnswers:
    """Of all requests together, from the work for them until their clients have taken them. On the event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def expect(self, trail: Trail, count: int) -> None:
        """This request's answer may come to so many bytes. TooLarge (413) if no answer may, QueueFull (429) if there
        is no room for it now.
        """
        if count <= PIECE_BYTES:
            return
        if count > self.limit:
            raise TooLarge(
                f"the answer could come to {count:,} bytes, the limit is {self.limit:,}; send fewer inputs per call"
            )
        if self.held + count > self.limit:
            raise QueueFull(
                f"the answer could come to {count:,} bytes, and {self.held:,} of the {self.limit:,} that there may be "
                "are held by other large answers; send fewer inputs per call, or try again in a moment"
            )
        self.hold(trail, count)

    def hold(self, trail: Trail, count: int) -> None:
        """This request's answer counts with so many bytes from now on: what it has, or none when it is over."""
        self.held += count - trail.answer_bytes
        trail.answer_bytes = count


def seconds_for(count: int) -> float:
    """How long a client may be waited for with a large answer of so many bytes."""
    return PATIENCE_SECONDS + count / SLOWEST_BYTES_PER_SECOND


def in_pieces(body: bytes | memoryview) -> Iterator[bytes]:
    """The body of an answer as it is sent: the server waits before a piece if the last one was not taken."""
    for start in range(0, len(body), PIECE_BYTES):
        yield bytes(body[start : start + PIECE_BYTES])
