"""The engine: workers that share the sessions of one artifact, and the door in front of them.

A worker is one thread that decodes its own rows, with one processor's worth of ONNX Runtime. Two of them do more than
one whose calls are split over two threads: the operators of a decoder step are too short to be worth a split, and while
one worker is in Python the other computes. Commands go in by queues, events come out; the one lock here is the door at
which callers wait for one another. It knows neither text nor HTTP.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

from service.admission import Admission
from service.artifact import Artifact
from service.core import Core
from service.errors import StartupError, TooLarge, Unavailable, ValidationFailed
from service.memory import MIB, Memory
from service.metrics import Metrics
from service.processors import Division
from service.rehearsal import examine, self_test, warm_up
from service.runner import Runner
from service.sequence import GenerateParameters, Sequence
from service.settings import Settings
from service.tally import Load
from service.worker import Worker

Status = Literal["new", "starting", "ready", "failing", "draining", "stopped", "failed"]
"""`failing`: calls of the model fail, and so does its examination; it may come to be ready again."""

log = logging.getLogger(__name__)

_SWITCH_INTERVAL = 0.001
"""Seconds after which a thread that runs Python makes room for another that waits."""


class Engine:
    """Serves one artifact. Thread-safe: every public method may be called from any thread but the workers' own.

    All events of an iteration are posted together at its end, by `Sequence.on_event`, on a worker's thread.
    """

    def __init__(
        self,
        artifact: Artifact,
        settings: Settings,
        metrics: Metrics,
        *,
        memory: Memory | None = None,
        open_cores: Callable[[], list[Core]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.artifact = artifact
        self._settings = settings
        self._metrics = metrics
        self._memory = memory or Memory()
        self._clock = clock
        self._open_cores = open_cores or self._open_artifact
        self._door = threading.Lock()
        self._admission = Admission(settings, lambda: (worker.left_line for worker in self._workers))
        self._status: Status = "new"  # written behind the door
        self._workers: list[Worker] = []
        self._ended_workers = 0
        self._drain_deadline: float | None = None
        self._decided = threading.Event()  # ready, or never
        self._failure: StartupError | None = None
        self._facts: dict[str, object] = {}
        self._scores = self._aligns = True  # whether the artifact can; known when it is open
        self._opener = threading.Thread(target=self._open, name="engine", daemon=True)
        self._division = Division.of(settings, on_gpu=settings.provider == "cuda")
        metrics.follow(self)

    @property
    def status(self) -> Status:
        """Where it is in its life. `ready` is the only one in which `submit` accepts."""
        if self._status == "ready" and any(worker.sick for worker in self._workers):
            return "failing"
        return self._status

    @property
    def rows_per_sequence(self) -> int:
        """Rows that one sequence may take at most: those of one worker."""
        return self._division.rows

    @property
    def ready(self) -> bool:
        """Whether `submit` accepts."""
        return self.status == "ready"

    @property
    def line(self) -> tuple[int, int]:
        """How many sequences were accepted and nobody works on yet, and of how many tokens they are."""
        waiting = self._admission.waiting
        return waiting.inputs, waiting.tokens

    def start(self) -> None:
        """Open the sessions, run the self-test, warm up, and begin to serve, in threads. Returns at once."""
        self._status = "starting"
        # After each call into ONNX Runtime a worker wants the interpreter's lock back. By default it would wait
        # 5 ms for it beside a busy thread, longer than a step of a small model; that is measured 2 x slower.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        self._opener.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Block until ready: True; False if the time ran out. Raises the StartupError with which starting failed."""
        decided = self._decided.wait(timeout)
        if self._failure is not None:
            raise self._failure
        return decided

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all of them, which are of one client, or none.

        Raises at once TooLarge (could never fit), ValidationFailed, QueueFull, or Unavailable (not ready, draining).
        """
        for sequence in sequences:
            self._check(sequence)
        load = Load(len(sequences), sum(sequence.tokens for sequence in sequences))
        with self._door:
            self._require_room(load, sequences[0].client if sequences else "")
            self._admission.add(sequences)
            now = self._clock()
            for sequence in sequences:
                sequence.submitted_at = now
            for worker, share in zip(self._workers, self._shares(sequences), strict=True):
                if share:
                    worker.submit(share)

    def require_room(self, client: str) -> None:
        """Raises QueueFull or Unavailable if `submit` would refuse even the shortest input of this client now."""
        with self._door:
            self._require_room(Load(1, 1), client)

    def _require_room(self, load: Load, client: str) -> None:
        """Behind the door."""
        if (status := self.status) != "ready":
            raise Unavailable(_UNAVAILABLE.get(status, f"the model is {status}"))
        self._admission.require_room(load, client, self._clock())

    def cancel(self, sequences: list[Sequence]) -> None:
        """Give them up, wherever they are: their rows are free within a step. No event follows."""
        for number, worker in enumerate(self._workers):
            own = [sequence for sequence in sequences if sequence.worker == number]
            if own:
                worker.cancel(own)

    def drain(self, seconds: float) -> None:
        """Accept nothing more, answer what was accepted, then stop; after `seconds` the rest fails with Unavailable.

        Returns at once; `join` waits. A second call can only shorten the time.
        """
        deadline = self._clock() + seconds
        with self._door:
            if self._status in ("starting", "ready"):
                self._status = "draining"
            self._drain_deadline = deadline
            for worker in self._workers:
                worker.drain(deadline)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the threads' end; False if the time ran out."""
        end = None if timeout is None else time.monotonic() + timeout
        if self._opener.ident is not None:
            self._opener.join(timeout)
        ended = [worker.join(None if end is None else max(0.0, end - time.monotonic())) for worker in self._workers]
        return not self._opener.is_alive() and all(ended)

    def stop(self) -> None:
        """Fail what is left with Unavailable, end the threads, and wait for that."""
        self.drain(0)
        self.join()

    def describe(self) -> dict[str, object]:
        """Facts for people: provider, precision, threads, memory. Empty until ready. For the log and /v1/models."""
        return dict(self._facts)

    def _shares(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """Each sequence to the worker that has the fewest; of equals to the first."""
        loads = [worker.unfinished for worker in self._workers]
        shares: list[list[Sequence]] = [[] for _ in loads]
        for sequence in sequences:
            sequence.worker = number = loads.index(min(loads))
            loads[number] += 1
            shares[number].append(sequence)
        return shares

    def _open(self) -> None:
        try:
            cores = self._open_cores()
        except Exception as error:
            if not isinstance(error, StartupError):
                log.exception("starting failed")
                error = StartupError(f"the model could not be started: {error}")
            self._failure = error
            with self._door:
                self._status = "failed"
            self._metrics.leave(self)
            self._decided.set()
            return
        with self._door:
            self._workers = [
                Worker(core, number, clock=self._clock, examine=examine, on_end=self._ended)
                for number, core in enumerate(cores)
            ]
            for worker in self._workers:
                if self._drain_deadline is not None:
                    worker.drain(self._drain_deadline)
                worker.start()
            if self._status == "starting":
                self._status = "ready"
        self._decided.set()

    def _ended(self) -> None:
        """A worker is about to end. They only end after a drain, when the door is shut already."""
        with self._door:
            self._ended_workers += 1
            if self._ended_workers == len(self._workers):
                self._status = "stopped"
                self._metrics.leave(self)

    def _open_artifact(self) -> list[Core]:
        settings, memory = self._settings, self._memory
        before = memory.resident
        runner = Runner(self.artifact, settings)
        self._division = division = runner.division
        self._scores, self._aligns = runner.scores, runner.aligns
        runners = [runner, *(runner.twin() for _ in range(division.workers - 1))]
        cores = [
            Core(each, self._metrics, max_rows=division.rows, encode_tokens=settings.encode_tokens, clock=self._clock)
            for each in runners
        ]
        first = cores[0]
        opened, began = memory.resident, time.monotonic()
        try:
            if runner.variant == "cpu":
                memory.promise(self, lambda: sum(core.state.max_nbytes - core.state.nbytes for core in cores))
            tests = self_test(runner, first.state, first.batch, first.ladder)
            warm_up(runner, first.state, first.batch, first.ladder, encode_tokens=settings.encode_tokens)
            memory.require()
        except BaseException:
            for core in cores:
                core.close()
            memory.release(self)
            raise
        state_bytes_limit = sum(core.state.max_nbytes for core in cores)
        self._facts = {
            "provider": runner.variant,
            "precision": runner.precision,
            "workers": division.workers,
            "threads": division.threads,
            "max_rows": division.workers * division.rows,
            "session_bytes": opened - before,
            "working_bytes": (warmed := memory.resident) - opened,
            "state_bytes_limit": state_bytes_limit,
            "self_tests": tests,
        }
        log.info(
            "%s is ready on %s, %s, %d workers with %d threads each: %d sentences of the self-test came out, warm-up "
            "took %.1f s",
            self.artifact.name, runner.variant, runner.precision, division.workers, division.threads, tests,
            time.monotonic() - began,
        )  # fmt: skip
        log.info(
            "memory of %s in MiB: sessions and weights %.0f, working memory %.0f, state of %d rows %.0f now and %.0f "
            "at most; the process has %.0f and can come to %.0f of the %s that it may have",
            self.artifact.name, (opened - before) / MIB, (warmed - opened) / MIB, division.workers * division.rows,
            sum(core.state.nbytes for core in cores) / MIB, state_bytes_limit / MIB, warmed / MIB,
            memory.expected / MIB, "unknown number" if memory.limit is None else f"{memory.limit / MIB:,.0f}",
        )  # fmt: skip
        return cores

    def _check(self, sequence: Sequence) -> None:
        """What a caller should have seen to itself; it would harm others, so it is asked again."""
        manifest, length = self.artifact.manifest, len(sequence.source_ids)
        if length > manifest.max_source_tokens:
            raise TooLarge(f"the source has {length} tokens, the model takes {manifest.max_source_tokens}")
        self._check_ids("source", sequence.source_ids)
        if sequence.kind in ("generate", "score") and not manifest.generates:
            raise ValidationFailed(_NO_DECODER)
        if sequence.kind == "classify" and not manifest.labels:
            raise ValidationFailed(
                "this model has no labels: it is no classifier, as the loss classification of transduce train makes one"
            )
        if sequence.parameters is not None:
            self._check_parameters(sequence.parameters)
        if not self._scores and sequence.target_ids is not None:
            raise ValidationFailed(_CANNOT.format("scores"))
        if sequence.target_ids is not None:
            if len(sequence.target_ids) > manifest.max_target_tokens:
                raise TooLarge(
                    f"the target has {len(sequence.target_ids)} tokens, the model takes {manifest.max_target_tokens}"
                )
            self._check_ids("target", sequence.target_ids)

    def _check_parameters(self, parameters: GenerateParameters) -> None:
        if parameters.return_alignments and not self._aligns:
            raise ValidationFailed(_CANNOT.format("alignments"))
        limit = self.artifact.manifest.max_target_tokens
        if not 1 <= parameters.max_new_tokens <= limit:
            raise ValidationFailed(f"max_new_tokens has to be from 1 to {limit}")
        if len(parameters.prefix_ids) >= limit:
            raise ValidationFailed(f"the prefix has {len(parameters.prefix_ids)} tokens, {limit - 1} are allowed")
        if parameters.prefix_ids:
            self._check_ids("prefix", list(parameters.prefix_ids))
        if not 1 <= parameters.rows <= self.rows_per_sequence:
            raise ValidationFailed(
                f"this takes {parameters.rows} rows for one input, {self.rows_per_sequence} are allowed: ask for fewer "
                "beams or sequences, or serve with more --max-rows"
            )

    def _check_ids(self, what: str, ids: list[int]) -> None:
        size = self.artifact.manifest.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < size:
            raise ValidationFailed(f"{what} ids have to be from 0 to {size - 1}, one at least")


_NO_DECODER = "this model has no decoder: it encodes texts and writes none"

_CANNOT = (
    "this model gives no {}: its artifact was exported without a scorer; whoever runs it can export it again with "
    "transduce export"
)

_UNAVAILABLE = {
    "new": "the model is not loaded yet",
    "starting": "the model is being loaded",
    "failing": "the model fails at whatever it is given",
    "draining": "the service is shutting down",
    "stopped": "the service has stopped",
    "failed": "the model could not be loaded",
}
