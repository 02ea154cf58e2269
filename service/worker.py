"""A worker: one thread that owns a core, its rows and its buffers. Commands come in by a queue, events go out.

The thread repeats the core's iteration while there is work, and blocks on the queue only when there is none. Nothing
on its way takes a lock.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from service.core import Core
from service.errors import EngineFailure, Unavailable
from service.sequence import Sequence
from service.tally import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Submit:
    sequences: list[Sequence]


@dataclass(frozen=True, slots=True)
class _Cancel:
    sequences: list[Sequence]


@dataclass(frozen=True, slots=True)
class _Drain:
    deadline: float


_Command: TypeAlias = _Submit | _Cancel | _Drain


class Worker:
    """Runs one core. Its methods may be called from any thread but its own; who calls `submit` sees to the order."""

    def __init__(self, core: Core, number: int, *, clock: Callable[[], float], on_end: Callable[[], None]) -> None:
        """`on_end` is called on the worker's thread before it looks at its queue for the last time: from then on
        nothing must be submitted."""
        self.submitted = 0
        """Sequences ever; written by the caller of `submit`."""
        self._core = core
        self._clock = clock
        self._on_end = on_end
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._drain_deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"worker {number}", daemon=True)

    @property
    def left_line(self) -> Tally:
        """Sequences that were submitted and do not wait any more."""
        return self._core.scheduler.left_line

    @property
    def unfinished(self) -> int:
        """Sequences that were submitted and have not come to an end."""
        return self.submitted - self._core.scheduler.finished

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Take them."""
        self.submitted += len(sequences)
        self._commands.put(_Submit(sequences))

    def cancel(self, sequences: list[Sequence]) -> None:
        """Give them up if they are here: their rows are free within a step."""
        self._commands.put(_Cancel(sequences))

    def drain(self, deadline: float) -> None:
        """End when all is answered, or at `deadline` on the clock; a second call can only bring it forward."""
        self._commands.put(_Drain(deadline))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if the time ran out."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- its thread ----

    def _run(self) -> None:
        core = self._core
        while self._take_commands():
            try:
                core.iterate()
            except Exception:
                log.exception("an iteration failed; everything it was working on is answered with an error")
                error = EngineFailure("the engine failed while it worked on this request; the service's log says how")
                core.fail_all(error)
        self._on_end()
        self._take_what_is_left()
        core.fail_all(Unavailable("the service stopped before this request's turn was over"))

    def _take_commands(self) -> bool:
        """Obey what has come, waiting for it if there is nothing else to do. False when it is time to end."""
        core = self._core
        blocks = core.idle and self._drain_deadline is None
        if blocks:
            core.check_integrity()
            self._obey(self._commands.get())
        self._take_what_is_left()
        if self._drain_deadline is None:
            return True
        return not core.idle and self._clock() < self._drain_deadline

    def _take_what_is_left(self) -> None:
        try:
            while True:
                self._obey(self._commands.get_nowait())
        except queue.Empty:
            pass

    def _obey(self, command: _Command) -> None:
        match command:
            case _Submit(sequences):
                self._core.add(sequences)
            case _Cancel(sequences):
                self._core.cancel(sequences)
            case _Drain(deadline):
                self._drain_deadline = min(deadline, math.inf if self._drain_deadline is None else self._drain_deadline)
