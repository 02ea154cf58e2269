"""Who may stand in line, and when the others are to come back: what waits, whose it is, how fast the line moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from service.errors import QueueFull, TooLarge
from service.sequence import Sequence
from service.settings import Settings
from service.tally import Load, Tally

_LOOK_SECONDS = 0.25
"""The line's pace is measured over so long at least."""

_LONGEST_RETRY = 60
"""Seconds. A longer line may have moved quite differently by then."""


class Admission:
    """The bounds of the line: in inputs, tokens and seconds, and of each client. Used behind the engine's door."""

    def __init__(self, settings: Settings, left_line: Callable[[], Iterable[Tally]]) -> None:
        """`left_line` gives each worker's tally of what does not wait any more."""
        self._limit = Load(settings.max_queue, settings.max_queue_tokens)
        self._max_wait = settings.max_wait
        self._left_line = left_line
        self._came = Tally()
        self._pace = _Pace()

    @property
    def waiting(self) -> Load:
        """What is in line."""
        return self._came.all - sum((tally.all for tally in self._left_line()), Load())

    def waiting_of(self, client: str) -> Load:
        """What one client has in line."""
        return self._came.of(client) - sum((tally.of(client) for tally in self._left_line()), Load())

    def add(self, sequences: Iterable[Sequence]) -> None:
        """They are in line."""
        for sequence in sequences:
            self._came.add(sequence)

    def require_room(self, load: Load, client: str, now: float) -> None:
        """TooLarge (413) for what could never be taken, QueueFull (429) for what has to come back later.

        Who has a name may have as much in line as it leaves free: half of the line if it is alone, a third each if
        two are as busy (dynamic thresholds; Choudhury and Hahne, 1998). So there is room for one more client.
        """
        limit, waiting = self._limit, self.waiting
        self._pace.look(now, self._came.all.tokens - waiting.tokens, waiting.tokens)
        most, whose = (Load(limit.inputs // 2, limit.tokens // 2), " for one client") if client else (limit, "")
        if not load.within(most):
            raise TooLarge(f"{load} in one call are more than the line can ever hold{whose} ({most}); split the call")
        if not (waiting + load).within(limit):
            message = f"the line is full: {waiting.inputs:,} of {limit.inputs:,} inputs wait"
            raise self._refusal(f"{message}, {waiting.tokens:,} of {limit.tokens:,} tokens", waiting.tokens)
        own = self.waiting_of(client) if client else waiting
        if client and not (own + load).within(limit - waiting):
            raise self._refusal(
                f"your share of the line is full: {own} of yours wait, {limit - waiting} are free", own.tokens
            )
        ahead = min(waiting.tokens, own.tokens * self._clients_waiting()) if client else waiting.tokens
        if self._max_wait and (seconds := self._pace.seconds(ahead)) > self._max_wait:
            raise self._refusal(f"the wait would be {seconds:.1f} s, the limit is {self._max_wait:g} s", ahead)

    def _clients_waiting(self) -> int:
        return sum(self.waiting_of(client).inputs > 0 for client in self._came.clients)

    def _refusal(self, message: str, tokens_ahead: int) -> QueueFull:
        seconds = min(self._pace.seconds(tokens_ahead), _LONGEST_RETRY)
        return QueueFull(message, retry_after=max(1, math.ceil(seconds)))


class _Pace:
    """Tokens per second that leave a line in which some wait."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._since, self._left = -math.inf, 0
        self._was_empty = False

    def look(self, now: float, left: int, waiting: int) -> None:
        """`left` tokens have ever left the line. Where nobody waited for some of the time, more could have left: that
        raises what was thought too low, and tells nothing else. It must be heeded: a line that is kept short by a pace
        that was low once is empty again and again.
        """
        self._was_empty |= waiting == 0
        if now - self._since < _LOOK_SECONDS:
            return
        rate = (left - self._left) / (now - self._since)
        if not self._was_empty:
            self._rate = rate if self._rate is None else (self._rate + rate) / 2
        elif self._rate is not None:
            self._rate = max(self._rate, rate)
        self._since, self._left, self._was_empty = now, left, False

    def seconds(self, tokens: int) -> float:
        """Until so many have left; 0 while nothing is known."""
        if self._rate is None or tokens == 0:
            return 0.0
        return tokens / self._rate if self._rate else math.inf
