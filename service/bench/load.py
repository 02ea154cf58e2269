"""Load on a server, and what came of it.

    async with Target("http://127.0.0.1:8000") as target:
        workload = Workload(texts=texts, duration=10)
        for load in (Clients(1), Clients(64), Rate(20)):
            point = await measure(target, load, workload)
            print(load, point.tokens_per_second, point.latency)

Requests that come before the window of time that counts, and those that still run when it closes, are part of the load:
so a server is measured under the load that the point names, and not while that builds up or fades away. Under uvloop
(`uvloop.run`) the load costs less processor time, of streams a fifth, and is sent more punctually.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable

from service.bench.exposition import ServerFigures, server_figures
from service.bench.report import NOT_SENT, Point, Reply, Window, summarise
from service.bench.target import Target
from service.bench.workload import Load, Rate, Workload

OnReply = Callable[[Reply, bool], None]
"""Is told of each reply as it comes, and whether the window is open."""

_AFTER_FAILURE_SECONDS = 0.1
"""A client of a closed loop waits so long after a failure: otherwise it would only measure how fast it is refused."""


async def measure(
    target: Target,
    load: Load,
    workload: Workload,
    *,
    on_reply: OnReply | None = None,
    stop: asyncio.Event | None = None,
) -> Point:
    """Load the server, wait until everything is answered, and say what was found.

    If `stop` is set meanwhile, what is open is abandoned.
    """
    session = _Session(target, workload, on_reply)
    driver = asyncio.create_task(session.run(load))
    stopper = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({driver, stopper}, return_when=asyncio.FIRST_COMPLETED)
        interrupted = not driver.done()
    finally:
        stopper.cancel()
        driver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await driver
    session.close_window(time.perf_counter())
    return summarise(load, session.replies, session.window, await session.server_figures(), interrupted=interrupted)


class _Session:
    """The requests of one point, and the window of time that counts."""

    def __init__(self, target: Target, workload: Workload, on_reply: OnReply | None) -> None:
        self.replies: list[Reply] = []
        self._target = target
        self._workload = workload
        self._on_reply = on_reply
        self._inputs = workload.draw()
        self._in_flight = 0
        self._opened: float | None = None
        self._closed: float | None = None
        self._cpu_seconds = 0.0
        self._pages: list[asyncio.Task[str | None]] = []

    @property
    def window(self) -> Window:
        """The time that counted; of no length if it never came to that."""
        closed = self._closed or 0.0
        return Window(closed if self._opened is None else self._opened, closed, self._cpu_seconds)

    async def server_figures(self) -> ServerFigures | None:
        """The server's metrics of that time, None if it has none."""
        pages = await asyncio.gather(*self._pages)
        return server_figures(pages[0], pages[1]) if len(pages) == 2 and pages[0] and pages[1] else None

    async def run(self, load: Load) -> None:
        """Until the window has closed and nothing is open."""
        warm_up = self._workload.warm_up_of(load)
        async with asyncio.TaskGroup() as group:
            if isinstance(load, Rate):
                await self._send_arrivals(load, warm_up, group)
                return
            if not warm_up:
                self._open_window(time.perf_counter())
            for _ in range(load.count):
                group.create_task(self._run_client(warm_up))

    async def _run_client(self, warm_up: int) -> None:
        """One client of a closed loop. Whoever gets the reply that ends the warm-up, or the last one, says so."""
        requests = self._workload.requests
        while self._closed is None:
            reply, _ = await self._target.generate(next(self._inputs))
            self._take(reply)
            if len(self.replies) == warm_up:
                self._open_window(reply.ended)
            if requests is not None and len(self.replies) == warm_up + requests:
                self.close_window(reply.ended)
            if reply.failure is not None and self._closed is None:
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    async def _send_arrivals(self, rate: Rate, warm_up: int, group: asyncio.TaskGroup) -> None:
        """An open loop: one task per request, started when it is due."""
        requests, duration = self._workload.requests, self._workload.duration
        began = time.perf_counter()
        for number, offset in enumerate(self._workload.arrivals(rate)):
            due = began + offset
            end = math.inf if self._opened is None or duration is None else self._opened + duration
            if requests is not None and number == warm_up + requests:
                end = due
            if due >= end:
                await _until(end)
                self.close_window(end)
                return
            await _until(due)
            if number == warm_up:
                self._open_window(due)
            inputs = next(self._inputs)
            if self._in_flight < self._workload.max_in_flight:
                self._in_flight += 1
                group.create_task(self._arrive(inputs, due))
            else:
                now = time.perf_counter()
                self._take(Reply(due, now, None, now, len(inputs), failure=NOT_SENT))

    async def _arrive(self, inputs: list[str], due: float) -> None:
        reply, _ = await self._target.generate(inputs, due)
        self._in_flight -= 1
        self._take(reply)

    def _take(self, reply: Reply) -> None:
        self.replies.append(reply)
        if self._on_reply is not None:
            self._on_reply(reply, self._opened is not None and self._closed is None)

    def _open_window(self, at: float) -> None:
        self._opened = at
        self._cpu_seconds = -time.process_time()
        self._pages.append(asyncio.create_task(self._target.metrics()))
        if (duration := self._workload.duration) is not None:
            left = at + duration - time.perf_counter()
            asyncio.get_running_loop().call_later(left, self.close_window, at + duration)

    def close_window(self, at: float) -> None:
        """What is answered from now on does not count. Done once; ignored after that."""
        if self._closed is not None:
            return
        self._closed = at
        if self._opened is not None:
            self._cpu_seconds += time.process_time()
            self._pages.append(asyncio.create_task(self._target.metrics()))


async def _until(moment: float) -> None:
    """Sleep until then (time.perf_counter()), and never less: what is sent before it is due would fall out of a window
    that opens with it, and an event loop may wake up half a millisecond early.

    Lets others run even if it is past: an open loop that is late must not keep what it has sent from being read.
    """
    while True:
        left = moment - time.perf_counter()
        await asyncio.sleep(max(0.0, left))
        if left <= 0:
            return
