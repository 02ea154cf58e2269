"""A call: the sequences of one HTTP request between the event loop and the engine's threads.

The engine tells what happens on its own threads; a `Mailbox` carries that over to the event loop, all events of an
iteration in one hop. A call that is closed early (its client left, one of its inputs failed) cancels what still runs.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.errors import RequestError
from service.sequence import Encoded, Event, Failed, Scored, Sequence, Token
from service.trail import Trail

Answer = TypeVar("Answer", Encoded, Scored)
Taken = TypeVar("Taken")


class SubmitsSequences(Protocol):
    """What a call needs of the engine."""

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all of them or none."""

    def cancel(self, sequences: list[Sequence]) -> None:
        """Give them up."""


class EngineRefusal(Exception):
    """The engine refused or failed a sequence."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(str(error))
        self.error = error


class Mailbox:
    """Events from the engine's threads to one event loop, each thread's in order, one hop for as many as have come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[Callable[[int, Event], None], int, Event]] = deque()
        self._hop_scheduled = False

    def post(self, deliver: Callable[[int, Event], None], index: int, event: Event) -> None:
        """On one of the engine's threads: have the loop call `deliver(index, event)`."""
        self._events.append((deliver, index, event))
        if not self._hop_scheduled:
            self._hop_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._deliver_all)

    def _deliver_all(self) -> None:
        # Cleared before the first event is taken: one that comes meanwhile asks for a hop that may find nothing to do,
        # and none is left behind. Two threads may both ask for one: the second finds nothing.
        self._hop_scheduled = False
        while self._events:
            deliver, index, event = self._events.popleft()
            deliver(index, event)


class Call:
    """The sequences of one HTTP request, from submission to their last events. Used on the event loop, as a context."""

    def __init__(self, engine: SubmitsSequences, mailbox: Mailbox, trail: Trail) -> None:
        """`trail` is the request's: it says who asks, and is told what comes of it."""
        self._engine = engine
        self._trail = trail
        self._mailbox = mailbox
        self._open: dict[int, Sequence] = {}
        self._arrived: list[tuple[int, Event]] = []
        self._wake = asyncio.Event()
        self._client_left = False
        self._watcher: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Call [{len(self._open)} open, {len(self._arrived)} events to read]>"

    def listener(self, index: int) -> Callable[[Event], None]:
        """The `on_event` of the sequence for input `index`."""
        return lambda event: self._mailbox.post(self._deliver, index, event)

    def submit(self, sequences: dict[int, Sequence], receive: Receive) -> None:
        """Hand the sequences over, by the index of their input, and watch for the client's leaving from now on."""
        for sequence in sequences.values():
            sequence.client = self._trail.client
        self._trail.submit(sequences)
        try:
            self._engine.submit(list(sequences.values()))
        except RequestError as error:
            raise EngineRefusal(error) from None
        self._open = dict(sequences)
        self._watcher = asyncio.create_task(self._watch(receive))

    @property
    def open(self) -> bool:
        """Whether a sequence is still to end, or an event to be read."""
        return bool(self._open or self._arrived)

    async def events(self) -> list[tuple[int, Event]]:
        """All events that came since the last time, at least one; ClientDisconnect if the client left instead."""
        await self._wake.wait()
        if self._client_left:
            raise ClientDisconnect
        self._wake.clear()
        events, self._arrived = self._arrived, []
        return events

    async def answers(self, kind: type[Answer], take: Callable[[Answer], Taken]) -> dict[int, Taken]:
        """What `take` makes of each sequence's answer, by the index of its input; EngineRefusal if one failed.

        It is called as they come, so that of a large answer only what is wanted waits for the last.
        """
        found: dict[int, Taken] = {}
        while self.open:
            for index, event in await self.events():
                if isinstance(event, Failed):
                    raise EngineRefusal(event.error)
                if isinstance(event, kind):
                    found[index] = take(event)
        return found

    def close(self) -> None:
        """Cancel what has not ended; harmless when all has."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._open:
            self._engine.cancel(list(self._open.values()))
            self._open = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deliver(self, index: int, event: Event) -> None:
        if index not in self._open:
            return  # closed meanwhile
        if not isinstance(event, Token):
            self._trail.end(index, self._open.pop(index), event)
        self._arrived.append((index, event))
        self._wake.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_left = True
        self._wake.set()
