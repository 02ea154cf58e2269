"""The engine: one thread that owns token ids, rows and sessions. Commands go in by a queue, events come out.

The thread repeats the core's iteration while there is work, and blocks on the queue only when there is none. Nothing
on its way takes a lock: the one lock here is the door at which callers wait for one another. It knows neither text nor
HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from service.artifact import Artifact
from service.core import Core
from service.errors import EngineFailure, QueueFull, StartupError, TooLarge, Unavailable, ValidationFailed
from service.metrics import Metrics
from service.rehearsal import self_test, warm_up
from service.runner import Runner
from service.sequence import Sequence
from service.settings import Settings

Status = Literal["new", "starting", "ready", "draining", "stopped", "failed"]

log = logging.getLogger(__name__)

_SWITCH_INTERVAL = 0.001
"""Seconds after which a thread that runs Python makes room for another that waits."""


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


class Engine:
    """Serves one artifact. Thread-safe: every public method may be called from any thread but the engine's own.

    All events of an iteration are posted together at its end, by `Sequence.on_event`, on the engine's thread.
    """

    def __init__(
        self,
        artifact: Artifact,
        settings: Settings,
        metrics: Metrics,
        *,
        open_core: Callable[[], Core] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.artifact = artifact
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._open_core = open_core or self._open_artifact
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._status: Status = "new"  # written behind the door
        self._accepted = 0  # sequences ever, written behind the door
        self._core: Core | None = None
        self._drain_deadline: float | None = None
        self._decided = threading.Event()  # ready, or never
        self._failure: StartupError | None = None
        self._facts: dict[str, object] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.num_requests_waiting.set_function(lambda: float(self.waiting))

    @property
    def status(self) -> Status:
        """Where it is in its life. `ready` is the only one in which `submit` accepts."""
        return self._status

    @property
    def waiting(self) -> int:
        """Sequences that were accepted and that nobody works on yet."""
        return self._accepted - (0 if self._core is None else self._core.scheduler.left_line)

    def start(self) -> None:
        """Start the thread: open the sessions, run the self-test, warm up. Returns at once."""
        self._status = "starting"
        # After each call into ONNX Runtime the engine wants the interpreter's lock back. By default it would wait
        # 5 ms for it beside a busy thread, longer than a step of a small model; that is measured 2 x slower.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Block until ready: True; False if the time ran out. Raises the StartupError with which starting failed."""
        decided = self._decided.wait(timeout)
        if self._failure is not None:
            raise self._failure
        return decided

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all of them or none.

        Raises at once TooLarge (could never fit), ValidationFailed, QueueFull, or Unavailable (not ready, draining).
        """
        for sequence in sequences:
            self._check(sequence)
        count, limit = len(sequences), self._settings.max_queue
        if count > limit:
            raise TooLarge(f"{count} inputs in one call are more than the line can ever hold ({limit})")
        with self._door:
            if self._status != "ready":
                raise Unavailable(_UNAVAILABLE.get(self._status, f"the model is {self._status}"))
            if self.waiting + count > limit:
                raise QueueFull(f"the line is full: {self.waiting} of {limit} inputs wait")
            now = self._clock()
            for sequence in sequences:
                sequence.submitted_at = now
            self._accepted += count
            self._commands.put(_Submit(sequences))

    def cancel(self, sequences: list[Sequence]) -> None:
        """Give them up, wherever they are: their rows are free within a step. No event follows."""
        self._commands.put(_Cancel(sequences))

    def drain(self, seconds: float) -> None:
        """Accept nothing more, answer what was accepted, then stop; after `seconds` the rest fails with Unavailable.

        Returns at once; `join` waits. A second call can only shorten the time.
        """
        with self._door:
            if self._status in ("starting", "ready"):
                self._status = "draining"
        self._commands.put(_Drain(self._clock() + seconds))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if the time ran out."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Fail what is left with Unavailable, end the thread, and wait for that."""
        self.drain(0)
        self.join()

    def describe(self) -> dict[str, object]:
        """Facts for people: provider, precision, threads, memory. Empty until ready. For the log and /v1/models."""
        return dict(self._facts)

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            self._core = core = self._open_core()
        except Exception as error:
            if not isinstance(error, StartupError):
                log.exception("starting failed")
                error = StartupError(f"the model could not be started: {error}")
            self._failure = error
            self._become("failed")
            return
        self._become("ready")
        while self._take_commands(core):
            try:
                core.iterate()
            except Exception:
                self._recover(core)
        self._close(core)

    def _take_commands(self, core: Core) -> bool:
        """Obey what has come, waiting for it if there is nothing else to do. False when it is time to end."""
        blocks = core.idle and self._drain_deadline is None
        if blocks:
            core.check_integrity()
        try:
            while True:
                self._obey(core, self._commands.get(blocks))
                blocks = False
        except queue.Empty:
            pass
        if self._drain_deadline is None:
            return True
        return not core.idle and self._clock() < self._drain_deadline

    def _obey(self, core: Core, command: _Command) -> None:
        match command:
            case _Submit(sequences):
                core.add(sequences)
            case _Cancel(sequences):
                core.cancel(sequences)
            case _Drain(deadline):
                self._drain_deadline = min(deadline, math.inf if self._drain_deadline is None else self._drain_deadline)

    def _recover(self, core: Core) -> None:
        log.exception("an iteration failed; everything it was working on is answered with an error")
        core.fail_all(EngineFailure("the engine failed while it worked on this request; the service's log says how"))

    def _close(self, core: Core) -> None:
        self._become("stopped")  # from here on nothing is accepted, so what is in the queue now is all there is
        try:
            while True:
                self._obey(core, self._commands.get(False))
        except queue.Empty:
            pass
        core.fail_all(Unavailable("the service stopped before this request's turn was over"))

    def _become(self, status: Status) -> None:
        with self._door:
            if status != "ready" or self._status == "starting":
                self._status = status
        self._decided.set()

    def _open_artifact(self) -> Core:
        settings = self._settings
        runner = Runner(self.artifact, settings)
        core = Core(
            runner, self._metrics, max_rows=settings.max_rows, encode_tokens=settings.encode_tokens, clock=self._clock
        )
        began = time.monotonic()
        tests = self_test(runner, core.state, core.batch, core.ladder)
        warm_up(runner, core.state, core.batch, core.ladder, encode_tokens=settings.encode_tokens)
        self._facts = {
            "provider": runner.variant,
            "precision": runner.precision,
            "threads": runner.threads,
            "max_rows": settings.max_rows,
            "state_bytes_limit": core.state.max_nbytes,
            "self_tests": tests,
        }
        log.info(
            "%s is ready on %s, %s, %d threads: %d sentences of the self-test came out, warm-up took %.1f s; "
            "the state of %d rows takes %.0f MiB now and %.0f MiB at most",
            self.artifact.name, runner.variant, runner.precision, runner.threads, tests, time.monotonic() - began,
            settings.max_rows, core.state.nbytes / 2**20, core.state.max_nbytes / 2**20,
        )  # fmt: skip
        return core

    def _check(self, sequence: Sequence) -> None:
        """What a caller should have seen to itself; it would harm others, so it is asked again."""
        manifest, length = self.artifact.manifest, len(sequence.source_ids)
        if length > manifest.max_source_tokens:
            raise TooLarge(f"the source has {length} tokens, the model takes {manifest.max_source_tokens}")
        if not length or not 0 <= min(sequence.source_ids) <= max(sequence.source_ids) < manifest.vocab_size:
            raise ValidationFailed(f"source ids have to be from 0 to {manifest.vocab_size - 1}, one at least")
        if sequence.parameters is not None:
            limit = manifest.max_target_tokens
            if not 1 <= sequence.parameters.max_new_tokens <= limit:
                raise ValidationFailed(f"max_new_tokens has to be from 1 to {limit}")


_UNAVAILABLE = {
    "new": "the model is not loaded yet",
    "starting": "the model is being loaded",
    "draining": "the service is shutting down",
    "stopped": "the service has stopped",
    "failed": "the model could not be loaded",
}
