"""How many refusals are given.

Saying no takes time from those who were let in, and a loop that does nothing else answers no probe either. So beyond
`REFUSALS_PER_SECOND` a connection that is refused again is not read until its turn has come: what its client sends
meanwhile stays in the system's buffers, and costs nothing. The first refusal on a connection belongs to the price of a
connection: its client may well close it, which nobody would see who does not read.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

REFUSALS_PER_SECOND = 400.0
"""A twentieth of a processor, at 120 to 150 us each where it decodes as well."""

AT_ONCE = 40
"""So many more after a while without any. And connections that are read again at a time, if nobody is refused."""

_TURN_SECONDS = 0.02


class Connection(Protocol):
    """What a ration needs of one."""

    def pause(self, forget: Callable[[Any], None]) -> bool:
        """Do not read it, and say so to `forget` if it is closed before it goes on. False if it is closing now."""

    def go_on(self) -> None:
        """Read it again."""


class Ration:
    """Used on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(AT_ONCE)  # below zero: given ahead of time, of a second at most
        self._owed = 0.0  # turns of those who wait, whoever comes meanwhile
        self._looked_at = clock()
        self._next_turn: asyncio.TimerHandle | None = None
        self._known: WeakSet[Connection] = WeakSet()
        self._waiting: dict[Connection, int] = {}  # in the order of their turns, with what was refused ahead of time

    @property
    def waiting(self) -> int:
        """Connections whose turn has not come."""
        return len(self._waiting)

    def take(self, connection: Connection) -> None:
        """A client was refused on this connection."""
        if connection not in self._known:
            self._known.add(connection)
            return
        self._refill()
        self._left = max(-REFUSALS_PER_SECOND, self._left - 1)
        if self._left < 0 and connection.pause(self.forget):
            if self._next_turn is None:
                self._owed = 0.0
                self._call_later()
            # One that sent ahead is refused while it waits: its turn is that of the last refusal.
            self._waiting[connection] = self._waiting.pop(connection, 0) + 1

    def forget(self, connection: Connection) -> None:
        """It was closed."""
        self._waiting.pop(connection, None)

    def _refill(self) -> None:
        now = self._clock()
        new = (now - self._looked_at) * REFUSALS_PER_SECOND
        self._left = min(float(AT_ONCE), self._left + new)
        self._owed += new / 2
        self._looked_at = now

    def _call_later(self) -> None:
        self._next_turn = asyncio.get_running_loop().call_later(_TURN_SECONDS, self.go_on)

    def go_on(self) -> None:
        """Those whose turn has come. They use up something only if they are refused again. Others who are refused may
        take half of the ration from them, not all of it."""
        self._next_turn = None
        self._refill()
        left = int(max(0.0, self._left))
        while self._waiting:
            connection, refusals = next(iter(self._waiting.items()))
            if left == 0 and self._owed < refusals:
                break
            left = max(0, left - 1)
            self._owed = max(0.0, self._owed - refusals)
            del self._waiting[connection]
            connection.go_on()
        if self._waiting:
            self._call_later()
