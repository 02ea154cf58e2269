"""The core of the engine: one iteration of continuous batching, in one thread, without queues.

Decides nothing about who is served (the scheduler does) and nothing about tokens (the searches do): it acts, keeps the
books of rows, and collects what has to be told. What fails is answered to the sequences concerned; the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from service.arrangement import Arrangement
from service.artifact import Manifest
from service.batch import Batch, Ints, StepOutput, pad
from service.errors import DeadlineExceeded, EngineFailure, RequestError
from service.hypothesis import Outlook, SpecialIds
from service.ladder import Ladder
from service.metrics import Metrics
from service.scheduler import Group, Scheduler
from service.search import endings, search_for
from service.sequence import (
    Encoded,
    Event,
    Failed,
    Finished,
    Floats,
    Result,
    Scored,
    Sequence,
    Stage,
    Timings,
    Token,
)
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

    def score(
        self, source_ids: Ints, source_lengths: Ints, target_ids: Ints, *, alignment: bool
    ) -> tuple[Floats, Floats | None]:
        """Log-probabilities (rows, target) of given targets, and attention (rows, target, source) if asked for."""

    def step(self, batch: Batch, state: State, k: int, logits: bool) -> StepOutput:
        """The k best candidates of each row, and its logits if they are wanted."""


class Core:
    """Rows, lines and buffers of one model. Not thread-safe: it belongs to the engine's thread."""

    def __init__(
        self, runner: Executes, metrics: Metrics, *, max_rows: int, encode_tokens: int, clock: Callable[[], float]
    ) -> None:
        manifest = runner.manifest
        self.runner = runner
        self.ladder = Ladder.of_lengths(manifest.max_source_tokens)
        self._target_ladder = Ladder.of_lengths(manifest.max_target_tokens)
        self._k_ladder = Ladder.of_counts(manifest.vocab_size)
        self.scheduler = Scheduler(
            max_rows=max_rows, encode_tokens=encode_tokens, source=self.ladder, target=self._target_ladder
        )
        self.state = runner.new_state(
            max_rows=max_rows,
            source=Ladder.of_capacities(manifest.max_source_tokens),
            target=Ladder.of_capacities(manifest.max_target_tokens),
        )
        self.batch = Batch(
            max_rows=max_rows, max_target_tokens=manifest.max_target_tokens, bos_id=manifest.special_tokens.bos_id
        )
        special = manifest.special_tokens
        self._pad_id = special.pad_id
        self._special = SpecialIds(special.bos_id, special.eos_id, (special.pad_id, special.bos_id))
        self._max_target_tokens = manifest.max_target_tokens
        self._metrics = metrics
        self._clock = clock
        self._events: list[tuple[Sequence, Event]] = []
        self._growths = self.state.growths
        self._last_token_at = 0.0
        self._layout = self.state.layout
        self._state_bytes = self.state.nbytes
        self._reported = _Levels()
        metrics.rows_capacity.inc(max_rows)
        metrics.state_bytes_limit.inc(self.state.max_nbytes)
        self._report()

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return self.scheduler.idle

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let them wait."""
        self.scheduler.add(sequences)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Give them up; their rows are free when this returns. Those that are not here (any more) are passed over."""
        move = Arrangement(self.batch.sequences)
        for sequence in sequences:
            if sequence.stage not in (Stage.WAITING, Stage.RUNNING):
                continue
            if sequence.stage is Stage.RUNNING:
                move.leave(sequence)
            self._finish(sequence, "cancelled", None)
        self._carry_out(move)

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
            output = self._step()
            stepped = clock()
            metrics.iteration["step"].observe(stepped - encoded)
            if output is not None:
                self._take(output, min(oldest_newcomer, self.batch.rows), stepped)
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
        batch = self.batch
        rows = (batch.rows, self.state.rows, len(batch.sequences))
        if len(set(rows)) != 1 or batch.rows > self.scheduler.rows_set_aside:
            raise RuntimeError(
                f"rows in use by batch, state and sequences differ, or are above those set aside: {rows}, "
                f"{self.scheduler.rows_set_aside}"
            )
        for sequence in dict.fromkeys(batch.sequences):
            if len(sequence.held) > sequence.rows or any(batch.sequences[row] is not sequence for row in sequence.held):
                raise RuntimeError(f"{sequence} says it holds the rows {sequence.held}, the batch does not")

    def _encode(self, group: Group) -> None:
        now = self._clock()
        sequences = group.sequences
        ids, lengths = pad([sequence.source_ids for sequence in sequences], group.length, self._pad_id)
        for sequence in sequences:
            sequence.admitted_at = now
            self._metrics.request_queue_time.observe(now - sequence.submitted_at)
        try:
            if group.kind == "encode":
                memory = self.runner.encode(ids, lengths)
                for sequence, vectors in zip(sequences, memory, strict=True):
                    own = vectors[: len(sequence.source_ids)].copy()  # lets go of the padding
                    self._finish(sequence, "stop", Encoded(own, self._timings(sequence)))
            elif group.kind == "score":
                self._score(group, ids, lengths)
            elif self._reserve(source=group.length):
                self.runner.encode_into(self.state, ids, lengths)
                for sequence in sequences:
                    assert sequence.parameters is not None
                    sequence.search = search_for(sequence.parameters, self._special, self._max_target_tokens)
                self.state.append(len(sequences))
                self.batch.append(sequences)
            else:
                raise MemoryError("no memory for the newcomers' state")
        except Exception:
            log.exception("the encoder failed on %d sequences padded to %d tokens", len(sequences), group.length)
            self._fail(sequences)
            return
        valid = int(lengths.sum())
        self._metrics.source_tokens.inc(valid)
        self._metrics.padding_tokens.inc(group.tokens - valid)
        self._metrics.batch_padding_ratio.observe(1 - valid / group.tokens)

    def _score(self, group: Group, ids: Ints, lengths: Ints) -> None:
        targets = [sequence.target_ids or [] for sequence in group.sequences]
        target_ids, _ = pad(targets, group.target_length, self._pad_id)
        log_probabilities, _ = self.runner.score(ids, lengths, target_ids, alignment=False)
        for sequence, target, row in zip(group.sequences, targets, log_probabilities, strict=True):
            self._finish(sequence, "stop", Scored(row[: len(target)].tolist(), self._timings(sequence)))

    def _step(self) -> StepOutput | None:
        """What the step says of each row; None if it failed, and with it all that were running."""
        batch = self.batch
        if not self._reserve(target=int(batch.positions[: batch.rows].max()) + 1):
            return None
        k, logits = 1, False
        for sequence in batch.searching:
            assert sequence.search is not None
            k = max(k, sequence.search.k)
            logits = logits or sequence.search.wants_logits
        try:
            return self.runner.step(batch, self.state, self._k_ladder.rung(min(k, self._k_ladder.last)), logits)
        except Exception:
            log.exception("the decoder failed on a step of %d rows", batch.rows)
            self._fail_running()
            return None

    def _take(self, output: StepOutput, oldest_newcomer: int, now: float) -> None:
        batch = self.batch
        ids = output.ids[:, 0]
        leaving = endings(batch, ids, eos_id=self._special.eos, now=now)
        batch.take(ids, output.log_probabilities[:, 0])
        self._measure(oldest_newcomer, now)
        for row in batch.streams[: batch.rows].nonzero()[0].tolist():
            token = Token(int(ids[row]), float(output.log_probabilities[row, 0]))
            self._events.append((batch.sequences[row], token))
        move = Arrangement(batch.sequences)
        for row, reason in leaving.items():
            sequence = batch.sequences[row]
            move.leave(sequence)
            self._answer(sequence, [Result(*batch.result(row), reason)])
        if batch.searching:
            self._search(output, move, now)
        self._carry_out(move)
        for sequence in batch.searching:
            assert sequence.search is not None
            batch.feed(sequence, sequence.search.last_ids)

    def _search(self, output: StepOutput, move: Arrangement, now: float) -> None:
        """Every sequence with a search of its own takes its step."""
        ids, log_probabilities = output.ids.tolist(), output.log_probabilities.tolist()
        for sequence in self.batch.searching:
            search, held = sequence.search, sequence.held
            assert search is not None
            logits = output.logits[held] if output.logits is not None and search.wants_logits else None
            try:
                parents = search.advance(
                    Outlook([ids[row] for row in held], [log_probabilities[row] for row in held], logits)
                )
                if sequence.stream:
                    self._events += [(sequence, Token(id, value, result)) for result, id, value in search.certain()]
                late = sequence.deadline is not None and sequence.deadline <= now
                results = search.results() if search.done or late else None
            except Exception:
                log.exception("the search of a sequence failed")
                move.leave(sequence)
                self._fail([sequence])
                continue
            if results is None:
                move.branch(sequence, parents)
            else:
                move.leave(sequence)
                self._metrics.generated_tokens.inc(sum(len(result.ids) for result in results))
                self._answer(sequence, results)

    def _measure(self, oldest_newcomer: int, now: float) -> None:
        batch, metrics = self.batch, self._metrics
        metrics.batch_rows.observe(batch.rows)
        metrics.generated_tokens.inc(int(np.count_nonzero(batch.plain[: batch.rows])))
        for sequence in batch.sequences[oldest_newcomer:]:
            sequence.first_token_at = now
            metrics.time_to_first_token.observe(now - sequence.submitted_at)
        older = int(np.count_nonzero(batch.plain[:oldest_newcomer]))
        older += sum(sequence.held[0] < oldest_newcomer for sequence in batch.searching)
        if older:
            metrics.inter_token_latency.observe(now - self._last_token_at, older)
        self._last_token_at = now

    def _answer(self, sequence: Sequence, results: list[Result]) -> None:
        assert sequence.parameters is not None
        if sequence.parameters.return_alignments:
            try:
                results = [self._aligned(sequence, result) for result in results]
            except Exception:
                log.exception("the alignment of a sequence failed")
                self._fail([sequence])
                return
        self._finish(sequence, results[0].reason, Finished(results, self._timings(sequence)))

    def _aligned(self, sequence: Sequence, result: Result) -> Result:
        """With attention weights, from one pass over the finished text."""
        assert sequence.parameters is not None
        prefix, size = sequence.parameters.prefix_ids, len(sequence.source_ids)
        target = [*prefix, *result.ids]
        if not result.ids:
            return replace(result, alignment=np.empty((0, size), np.float32))
        source_ids, lengths = pad([sequence.source_ids], self.ladder.rung(size), self._pad_id)
        target_ids, _ = pad([target], self._target_ladder.rung(len(target)), self._pad_id)
        _, alignment = self.runner.score(source_ids, lengths, target_ids, alignment=True)
        assert alignment is not None
        return replace(result, alignment=alignment[0, len(prefix) : len(target), :size].copy())

    def _carry_out(self, move: Arrangement) -> None:
        """Rows leave, branch and move: in the batch and in the state."""
        if not move.close():
            return
        batch, order = self.batch, move.order
        moved = order[order != np.arange(len(order))]
        source = self.ladder.rung(int(batch.source_lengths[moved].max())) if moved.size else 0
        target = int(batch.positions[moved].max()) if moved.size else 0
        batch.rearrange(move)
        self.state.rearrange(order, strangers=move.strangers, source=source, target=target)
        if not batch.rows:
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
        sequences = list(dict.fromkeys(self.batch.sequences))
        self._forget_rows()
        self._fail(sequences)

    def _fail(self, sequences: list[Sequence]) -> None:
        error = EngineFailure("the model failed while it worked on this request; the service's log says how")
        for sequence in sequences:
            if sequence.stage is Stage.RUNNING:
                self._finish(sequence, "error", Failed(error))

    def _forget_rows(self) -> None:
        self.batch.clear()
        self.state.clear()
        self.state.renew()

    def _finish(self, sequence: Sequence, reason: str, event: Event | None) -> None:
        self.scheduler.finish(sequence)
        self._metrics.count_finished(sequence.endpoint, reason)
        if event is not None:
            self._events.append((sequence, event))
        if isinstance(event, (Finished, Encoded, Scored)):
            self._metrics.e2e_request_latency.observe(event.timings.total)

    def _timings(self, sequence: Sequence) -> Timings:
        began = sequence.submitted_at
        first = sequence.first_token_at - began if sequence.kind == "generate" else None
        return Timings(sequence.admitted_at - began, first, self._clock() - began)

    def _report(self) -> None:
        """Tell the gauges what has changed: other cores add to the same ones."""
        metrics, before = self._metrics, self._reported
        if self.state.layout != self._layout:
            self._layout, self._state_bytes = self.state.layout, self.state.nbytes
        now = _Levels(self.scheduler.running, self.batch.rows, self._state_bytes)
        if now != before:
            metrics.num_requests_running.inc(now.running - before.running)
            metrics.rows_in_use.inc(now.rows - before.rows)
            metrics.state_bytes.inc(now.state_bytes - before.state_bytes)
            self._reported = now
        if self.state.growths != self._growths:
            metrics.state_growths.inc(self.state.growths - self._growths)
            self._growths = self.state.growths


class _Levels(NamedTuple):
    """What a core has added to the gauges."""

    running: int = 0
    rows: int = 0
    state_bytes: int = 0
