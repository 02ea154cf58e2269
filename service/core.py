"""The core of the engine: one iteration of continuous batching, in one thread, without queues.

Decides nothing about who is served (the scheduler does) and nothing about tokens (the search does): it acts, keeps the
books of rows, and collects what has to be told. What fails is answered to the sequences concerned; the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from service.artifact import Manifest
from service.batch import Batch, Ints, pad
from service.errors import DeadlineExceeded, EngineFailure, RequestError
from service.ladder import Ladder
from service.metrics import Metrics
from service.scheduler import Group, Scheduler
from service.search import GREEDY_CANDIDATES, Candidates, Choice, endings, greedy
from service.sequence import Encoded, Event, Failed, Finished, Floats, Sequence, Stage, Timings, Token
from service.state import State

log = logging.getLogger(__name__)


class Executes(Protocol):
    """What the core asks of a runner."""

    @property
    def manifest(self) -> Manifest:
        """Of the artifact whose graphs it runs."""

    def new_state(self, *, max_rows: int, source: Ladder, target: Ladder) -> State:
        """Empty buffers."""

    def encode_into(self, state: State, ids: Ints, lengths: Ints) -> None:
        """Encode into the rows after those in use."""

    def encode(self, ids: Ints, lengths: Ints) -> Floats:
        """The encoder's memory."""

    def step(self, batch: Batch, state: State, k: int) -> tuple[Ints, Floats]:
        """The k best candidates of each row."""


class Core:
    """Rows, lines and buffers of one model. Not thread-safe: it belongs to the engine's thread."""

    def __init__(
        self, runner: Executes, metrics: Metrics, *, max_rows: int, encode_tokens: int, clock: Callable[[], float]
    ) -> None:
        manifest = runner.manifest
        self.runner = runner
        self.ladder = Ladder.of_lengths(manifest.max_source_tokens)
        self.scheduler = Scheduler(max_rows=max_rows, encode_tokens=encode_tokens, ladder=self.ladder)
        self.state = runner.new_state(
            max_rows=max_rows,
            source=Ladder.of_capacities(manifest.max_source_tokens),
            target=Ladder.of_capacities(manifest.max_target_tokens),
        )
        self.batch = Batch(
            max_rows=max_rows, max_target_tokens=manifest.max_target_tokens, bos_id=manifest.special_tokens.bos_id
        )
        self._pad_id = manifest.special_tokens.pad_id
        self._eos_id = manifest.special_tokens.eos_id
        self._metrics = metrics
        self._clock = clock
        self._events: list[tuple[Sequence, Event]] = []
        self._growths = self.state.growths
        self._layout = self.state.layout
        self._last_token_at = 0.0
        metrics.rows_capacity.set(max_rows)
        metrics.state_bytes_limit.set(self.state.max_nbytes)
        metrics.state_bytes.set(self.state.nbytes)

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return self.scheduler.idle

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let them wait."""
        self.scheduler.add(sequences)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Give them up; their rows are free when this returns. Those that are not here (any more) are passed over."""
        rows = []
        for sequence in sequences:
            if sequence.stage not in (Stage.WAITING, Stage.RUNNING):
                continue
            if sequence.stage is Stage.RUNNING:
                rows.append(sequence.row)
            self._finish(sequence, "cancelled", None)
        if rows:
            self._retire(rows)

    def iterate(self) -> None:
        """Admit, encode, step, select, retire, post."""
        clock, metrics = self._clock, self._metrics
        began = clock()
        for sequence in self.scheduler.expired(began):
            error = DeadlineExceeded("the timeout ran out while the request waited in line")
            self._finish(sequence, "timeout", Failed(error))
        groups = self.scheduler.admit()
        admitted = clock()
        metrics.iteration["schedule"].observe(admitted - began)
        oldest_newcomer = self.batch.rows
        if groups:
            for group in groups:
                self._encode(group)
            metrics.iteration["encode"].observe(clock() - admitted)
        if self.batch.rows:
            encoded = clock()
            choice = self._step()
            stepped = clock()
            metrics.iteration["step"].observe(stepped - encoded)
            if choice is not None:
                self._take(choice, min(oldest_newcomer, self.batch.rows), stepped)
        else:
            stepped = clock()
        self._report()
        self.post()
        metrics.iteration["select"].observe(clock() - stepped)

    def fail_all(self, error: RequestError) -> None:
        """Answer everyone, waiting or running, with this error, and begin anew with fresh buffers."""
        for sequence in [*self.scheduler.all_waiting(), *self.scheduler.all_running()]:
            self._finish(sequence, "error", Failed(error))
        self._forget_rows()
        self._report()
        self.post()

    def post(self) -> None:
        """Deliver what was collected."""
        events, self._events = self._events, []
        for sequence, event in events:
            try:
                sequence.on_event(event)
            except Exception:
                log.exception("a receiver of events failed; the event is dropped")

    def check_integrity(self) -> None:
        """Raises RuntimeError with the numbers if rows were lost or counted twice."""
        self.scheduler.check_integrity()
        rows = (self.scheduler.rows_in_use, self.batch.rows, self.state.rows, len(self.batch.sequences))
        if len(set(rows)) != 1:
            raise RuntimeError(f"rows in use by scheduler, batch, state and sequences differ: {rows}")

    def _encode(self, group: Group) -> None:
        now = self._clock()
        ids, lengths = pad([sequence.source_ids for sequence in group.sequences], group.length, self._pad_id)
        for sequence in group.sequences:
            sequence.admitted_at = now
            self._metrics.request_queue_time.observe(now - sequence.submitted_at)
        try:
            if group.kind == "encode":
                memory = self.runner.encode(ids, lengths)
                for sequence, vectors in zip(group.sequences, memory, strict=True):
                    own = vectors[: len(sequence.source_ids)].copy()  # lets go of the padding
                    self._finish(sequence, "stop", Encoded(own, self._timings(sequence)))
            elif self._reserve(source=group.length):
                self.runner.encode_into(self.state, ids, lengths)
                self.state.append(len(group.sequences))
                self.batch.append(group.sequences)
            else:
                raise MemoryError("no memory for the newcomers' state")
        except Exception:
            log.exception("the encoder failed on %d sequences padded to %d tokens", len(group.sequences), group.length)
            self._fail(group.sequences)
            return
        valid = int(lengths.sum())
        self._metrics.source_tokens.inc(valid)
        self._metrics.padding_tokens.inc(group.tokens - valid)
        self._metrics.batch_padding_ratio.observe(1 - valid / group.tokens)

    def _step(self) -> Choice | None:
        """What each row takes; None if it failed, and with it all that were running."""
        batch = self.batch
        if not self._reserve(target=int(batch.positions[: batch.rows].max()) + 1):
            return None
        try:
            candidates = Candidates(*self.runner.step(batch, self.state, GREEDY_CANDIDATES))
        except Exception:
            log.exception("the decoder failed on a step of %d rows", batch.rows)
            self._fail_running()
            return None
        return greedy(candidates)

    def _take(self, choice: Choice, oldest_newcomer: int, now: float) -> None:
        batch, metrics = self.batch, self._metrics
        rows = batch.rows
        leaving = endings(batch, choice, eos_id=self._eos_id, now=now)
        batch.take(choice.ids, choice.log_probabilities)
        metrics.batch_rows.observe(rows)
        metrics.generated_tokens.inc(rows)
        for sequence in batch.sequences[oldest_newcomer:]:
            sequence.first_token_at = now
            metrics.time_to_first_token.observe(now - sequence.submitted_at)
        if oldest_newcomer:
            metrics.inter_token_latency.observe(now - self._last_token_at, oldest_newcomer)
        self._last_token_at = now
        for row in batch.streams[:rows].nonzero()[0].tolist():
            token = Token(int(choice.ids[row]), float(choice.log_probabilities[row]))
            self._events.append((batch.sequences[row], token))
        for row, reason in leaving.items():
            sequence = batch.sequences[row]
            finished = Finished(reason, *batch.result(row), self._timings(sequence))
            self._finish(sequence, reason, finished)
        if leaving:
            self._retire(list(leaving))

    def _retire(self, rows: list[int]) -> None:
        """Take these rows out of use; the last ones fill the gaps."""
        batch = self.batch
        order = batch.without(rows)
        moved = [old for new, old in enumerate(order.tolist()) if new != old]
        source = self.ladder.rung(int(batch.source_lengths[moved].max())) if moved else 0
        target = int(batch.positions[moved].max()) if moved else 0
        batch.keep(order)
        self.state.keep(order, source=source, target=target)
        if not self.batch.rows:
            self.state.clear()

    def _reserve(self, *, source: int = 1, target: int = 1) -> bool:
        """Whether the capacities could be had; if not, no buffer can be trusted and all that were running failed."""
        try:
            self.state.reserve(source=source, target=target)
        except Exception:
            log.exception("the state cannot grow to %d source and %d target positions", source, target)
            self._fail_running()
            return False
        return True

    def _fail_running(self) -> None:
        sequences = self.batch.sequences
        self._forget_rows()
        self._fail(sequences)

    def _fail(self, sequences: list[Sequence]) -> None:
        error = EngineFailure("the model failed while it worked on this request; the service's log says how")
        for sequence in sequences:
            if sequence.stage is Stage.RUNNING:
                self._finish(sequence, "error", Failed(error))

    def _forget_rows(self) -> None:
        self.batch.keep(np.empty(0, np.int64))
        self.state.clear()
        self.state.renew()

    def _finish(self, sequence: Sequence, reason: str, event: Event | None) -> None:
        self.scheduler.finish(sequence)
        self._metrics.count_finished(sequence.endpoint, reason)
        if event is not None:
            self._events.append((sequence, event))
        if isinstance(event, (Finished, Encoded)):
            self._metrics.e2e_request_latency.observe(event.timings.total)

    def _timings(self, sequence: Sequence) -> Timings:
        began = sequence.submitted_at
        first = sequence.first_token_at - began if sequence.kind == "generate" else None
        return Timings(sequence.admitted_at - began, first, self._clock() - began)

    def _report(self) -> None:
        metrics = self._metrics
        metrics.num_requests_running.set(self.scheduler.running)
        metrics.rows_in_use.set(self.batch.rows)
        if self.state.layout != self._layout:
            self._layout = self.state.layout
            metrics.state_bytes.set(self.state.nbytes)
        if self.state.growths != self._growths:
            metrics.state_growths.inc(self.state.growths - self._growths)
            self._growths = self.state.growths
