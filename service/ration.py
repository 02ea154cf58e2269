"""How many refusals are given.

Saying no takes time from those who were let in, and a loop that does nothing else answers no probe either. So beyond
`REFUSALS_PER_SECOND` a connection that was refused is not read again until its turn has come: what its client sends
meanwhile stays in the system's buffers, and costs nothing.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

REFUSALS_PER_SECOND = 400.0
"""A twentieth of a processor, at 120 to 150 us each where it decodes as well."""

AT_ONCE = 40
"""So many more after a while without any. And connections that are read again at a time, if nobody is refused."""

_TURN_SECONDS = 0.02


class Connection(Protocol):
    """What a ration needs of one."""

    def pause(self) -> None:
        """Do not read it."""

    def go_on(self) -> None:
        """Read it again."""


class Ration:
    """Used on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(AT_ONCE)  # below zero: given ahead of time, of a second at most
        self._looked_at = clock()
        self._waiting: deque[Connection] = deque()

    @property
    def waiting(self) -> int:
        """Connections whose turn has not come. One that sent ahead waits once for each refusal."""
        return len(set(self._waiting))

    def take(self, connection: Connection) -> None:
        """A client was refused on this connection."""
        self._refill()
        self._left = max(-REFUSALS_PER_SECOND, self._left - 1)
        if self._left < 0:
            connection.pause()
            if not self._waiting:
                self._call_later()
            self._waiting.append(connection)

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(float(AT_ONCE), self._left + (now - self._looked_at) * REFUSALS_PER_SECOND)
        self._looked_at = now

    def _call_later(self) -> None:
        asyncio.get_running_loop().call_later(_TURN_SECONDS, self.go_on)

    def go_on(self) -> None:
        """Those whose turn has come. They use up something only if they are refused again."""
        self._refill()
        for _ in range(min(int(max(0.0, self._left)), len(self._waiting))):
            self._waiting.popleft().go_on()
        if self._waiting:
            self._call_later()
