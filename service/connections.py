"""The connections of the server: how many there are and may be, and how those end that are not closed in peace."""

import resource

from service.metrics import Families

REASONS = ("too_many", "slow_head", "slow_body", "stalled_reader", "malformed", "client_left")
"""Why a connection was ended, or a request on it not answered."""

_OTHER_FILES = 128
"""File descriptors that the process needs besides."""


class Connections:
    """Counted on the event loop."""

    def __init__(self, limit: int, families: Families) -> None:
        """Allows itself the file descriptors that so many take; where the system allows fewer, that is the limit."""
        self.limit = min(limit, _allow(limit + _OTHER_FILES) - _OTHER_FILES)
        self._families = families
        self._open = 0
        families.connections.set_function(lambda: float(self._open))
        for reason in REASONS:
            families.connection_troubles.labels(reason)

    def opened(self) -> bool:
        """One more; whether it is within the limit."""
        self._open += 1
        return self._open <= self.limit

    @property
    def far_too_many(self) -> bool:
        """Whether there are so many that not even a refusal can be waited for."""
        return self._open > self.limit + self.limit // 2 + 1

    def closed(self) -> None:
        """One less."""
        self._open -= 1

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
