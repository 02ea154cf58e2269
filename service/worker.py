"""A worker: one thread that owns a core, its rows and its buffers. Commands come in by a queue, events go out.

The thread repeats the core's iteration while there is work, and blocks on the queue only when there is none. Nothing
on its way takes a lock.

When calls of the model fail again and again, either the inputs are to blame or the model is, and the thread has it
examined. If it is sound, work goes on; if not, the worker is sick, and has it examined again from time to time.
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
from service.errors import Unavailable
from service.sequence import Sequence
from service.tally import Tally

log = logging.getLogger(__name__)

EXAMINE_SECONDS = 5.0
"""Between two examinations of a sick model."""


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

    def __init__(
        self,
        core: Core,
        number: int,
        *,
        clock: Callable[[], float],
        examine: Callable[[Core], None],
        on_end: Callable[[], None],
    ) -> None:
        """`examine` raises if the core's model is not sound. `on_end` is called on the worker's thread before it looks
        at its queue for the last time: from then on nothing must be submitted."""
        self.submitted = 0
        """Sequences ever; written by the caller of `submit`."""
        self.sick = False
        """Whether it had better get nothing to do; written by its thread."""
        self._examine = examine
        self._lost_count = False  # the books do not balance: only a new process helps
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
        while True:
            try:
                if not self._take_commands():
                    break
                core.iterate()
            except Exception:
                log.exception("an iteration failed; everything it was working on is answered with an error")
                core.recover()
            if core.suspect and not self.sick:
                self._look_after()
        self._on_end()
        self._take_what_is_left()
        core.fail_all(Unavailable("the service stopped before this request's turn was over"))
        core.close()

    def _take_commands(self) -> bool:
        """Obey what has come, waiting for it if there is nothing else to do. False when it is time to end."""
        core = self._core
        blocks = core.idle and self._drain_deadline is None
        if blocks:
            self._check_integrity()
            try:
                ill = self.sick and not self._lost_count
                self._obey(self._commands.get(timeout=EXAMINE_SECONDS if ill else None))
            except queue.Empty:
                self._look_after()
        self._take_what_is_left()
        if self._drain_deadline is None:
            return True
        return not core.idle and self._clock() < self._drain_deadline

    def _check_integrity(self) -> None:
        if self._lost_count:
            return
        try:
            self._core.check_integrity()
        except RuntimeError:
            log.exception("rows were lost or counted twice; this process should be replaced")
            self._lost_count = self.sick = True

    def _look_after(self) -> None:
        """Have the model examined; whether it is sound decides whether this worker is sick."""
        core = self._core
        try:
            self._examine(core)
        except Exception:
            log.exception("calls of the model failed in a row, and it fails its examination too")
            core.fail_all(Unavailable("the model fails at whatever it is given; try again in a moment"))
            self.sick = True
            return
        log.warning("calls of the model failed in a row, but it is sound: the fault lies in what it was given")
        core.trust()
        self.sick = self._lost_count

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
