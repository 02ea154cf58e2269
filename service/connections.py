"""The connections of the server: how many there are and may be, and how those end that are not closed in peace."""

import resource
from typing import Protocol

from service.metrics import Families

REASONS = ("too_many", "made_room", "slow_head", "slow_body", "stalled_reader", "malformed", "client_left")
"""Why a connection was ended, or a request on it not answered."""

_OTHER_FILES = 128
"""File descriptors that the process needs besides."""


class Connection(Protocol):
    """What is asked of one here."""

    def make_room(self) -> None:
        """Close it for another's sake."""


class Connections:
    """Counted on the event loop.

    A connection costs its client nothing, so many of them must not lock out others, probes least of all: where there
    are as many as there may be, the one that has kept the server waiting for the longest time makes room for a new one.
    """

    def __init__(self, limit: int, families: Families) -> None:
        """Allows itself the file descriptors that so many take; where the system allows fewer, that is the limit."""
        self.limit = min(limit, _allow(limit + _OTHER_FILES) - _OTHER_FILES)
        self._families = families
        self._open = 0
        self._waited_for: dict[Connection, None] = {}  # for the rest of a request, or for one; the longest first
        families.connections.set_function(lambda: float(self._open))
        for reason in REASONS:
            families.connection_troubles.labels(reason)

    def opened(self, connection: Connection) -> bool:
        """One more; whether there is room for it."""
        self._open += 1
        if self._open > self.limit:
            if (longest := next(iter(self._waited_for), None)) is None:
                return False
            self.works_for(longest)
            self.trouble("made_room")
            longest.make_room()
        self._waited_for[connection] = None
        return True

    def works_for(self, connection: Connection) -> None:
        """A whole request has come on this one."""
        self._waited_for.pop(connection, None)

    def waits_for(self, connection: Connection) -> None:
        """All that came on this one was answered."""
        self._waited_for.pop(connection, None)  # it may have been answered before the whole had come
        self._waited_for[connection] = None

    @property
    def far_too_many(self) -> bool:
        """Whether there are so many that not even a refusal can be waited for."""
        return self._open > self.limit + self.limit // 2 + 1

    def closed(self, connection: Connection) -> None:
        """One less."""
        self._open -= 1
        self._waited_for.pop(connection, None)

    def trouble(self, reason: str) -> None:
        """One of REASONS."""
        self._families.connection_troubles.labels(reason).inc()


def _allow(files: int) -> int:
    """File descriptors that the process may have, after asking for as many as that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= files:
        return files
    wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
