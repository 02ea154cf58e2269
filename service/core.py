"""The core of a worker: one iteration of continuous batching, in one thread, without queues.

Decides nothing about who is served (the scheduler does) and nothing about tokens (the searches do): it admits, encodes
and has the running rows take a step. What fails is answered to the sequences concerned; the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from service.batch import Batch, Ints, pad
from service.decoding import Decoding
from service.errors import DeadlineExceeded, EngineFailure, RequestError
from service.executes import Executes
from service.ladder import Ladder
from service.ledger import Ledger
from service.metrics import Metrics
from service.scheduler import Group, Scheduler
from service.sequence import Encoded, Failed, Scored, Sequence, Stage

log = logging.getLogger(__name__)


class Core:
    """Rows, lines and buffers of one model. Not thread-safe: it belongs to one thread."""

    def __init__(
        self, runner: Executes, metrics: Metrics, *, max_rows: int, encode_tokens: int, clock: Callable[[], float]
    ) -> None:
        manifest = runner.manifest
        self.runner = runner
        self.ladder = Ladder.of_lengths(manifest.max_source_tokens)
        self.scheduler = Scheduler(
            max_rows=max_rows,
            encode_tokens=encode_tokens,
            source=self.ladder,
            target=Ladder.of_lengths(manifest.max_target_tokens),
        )
        self.state = runner.new_state(
            max_rows=max_rows,
            source=Ladder.of_capacities(manifest.max_source_tokens),
            target=Ladder.of_capacities(manifest.max_target_tokens),
        )
        self.batch = Batch(
            max_rows=max_rows, max_target_tokens=manifest.max_target_tokens, bos_id=manifest.special_tokens.bos_id
        )
        self._pad_id = manifest.special_tokens.pad_id
        self._metrics = metrics
        self._clock = clock
        self._ledger = Ledger(self.scheduler, self.state, metrics, clock)
        self._decoding = Decoding(runner, self.state, self.batch, self._ledger, self.ladder)

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return self.scheduler.idle

    @property
    def suspect(self) -> bool:
        """Whether so many calls of the model failed in a row that it has to be examined, and no row is in the way."""
        return self._ledger.health.suspect and not self.batch.rows

    def trust(self) -> None:
        """The model was examined and is sound."""
        self._ledger.health.trust()

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let them wait."""
        self.scheduler.add(sequences)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Give them up; their rows are free when this returns. Those that are not here (any more) are passed over."""
        here = [s for s in dict.fromkeys(sequences) if s.stage in (Stage.WAITING, Stage.RUNNING)]
        self._decoding.leave([sequence for sequence in here if sequence.stage is Stage.RUNNING])
        for sequence in here:
            self._ledger.finish(sequence, "cancelled", None)

    def iterate(self) -> None:
        """Admit, encode, step, select, retire, post."""
        clock, phases = self._clock, self._metrics.iteration
        began = clock()
        for sequence in self.scheduler.expired(began):
            error = DeadlineExceeded("the timeout ran out while the request waited in line")
            self._ledger.finish(sequence, "timeout", Failed(error))
        groups = self.scheduler.admit()
        admitted = clock()
        phases["schedule"].observe(admitted - began)
        oldest_newcomer = self.batch.rows
        if groups:
            self._ledger.report()  # should a call never come back, they are seen to run
            for group in groups:
                self._encode(group)
            phases["encode"].observe(clock() - admitted)
        if self.batch.rows:
            encoded = clock()
            output = self._decoding.step()
            stepped = clock()
            phases["step"].observe(stepped - encoded)
            if output is not None:
                self._decoding.take(output, min(oldest_newcomer, self.batch.rows), stepped)
        else:
            stepped = clock()
        self._ledger.report()
        self._ledger.post()
        phases["select"].observe(clock() - stepped)

    def recover(self) -> None:
        """After an exception nobody knows what the buffers hold: those that ran fail, and the rest begins anew."""
        self._ledger.call_raised("iteration")
        error = EngineFailure("the engine failed while it worked on this request; the service's log says how")
        # With nobody at work it was those in line that it failed on, and it would again.
        self._fail(self.scheduler.all_running() or self.scheduler.all_waiting(), error)

    def fail_all(self, error: RequestError) -> None:
        """Answer everyone, waiting or running, with this error, and begin anew with fresh buffers."""
        self._fail([*self.scheduler.all_waiting(), *self.scheduler.all_running()], error)

    def _fail(self, sequences: list[Sequence], error: RequestError) -> None:
        for sequence in sequences:
            self._ledger.finish(sequence, "error", Failed(error))
        self._decoding.forget()
        self._ledger.report()
        self._ledger.post()

    def close(self) -> None:
        """It is no more; only the gauges have to know."""
        self._ledger.close()

    def check_integrity(self) -> None:
        """Raises RuntimeError with the numbers if rows were lost or counted twice."""
        self.scheduler.check_integrity()
        self._decoding.check_integrity(self.scheduler.rows_set_aside)

    def _encode(self, group: Group) -> None:
        now = self._clock()
        for sequence in group.sequences:
            sequence.admitted_at = now
            self._metrics.request_queue_time.observe(now - sequence.submitted_at)
        self._read(group)

    def _read(self, group: Group) -> None:
        """Have the model read newcomers. Where that fails each half is tried by itself, down to those it fails on."""
        sequences = group.sequences
        ids, lengths = pad([sequence.source_ids for sequence in sequences], group.length, self._pad_id)
        try:
            unsound = self._call(group, ids, lengths)
        except Exception:
            log.exception(
                "the model failed on %d texts padded to %d tokens, for %s", len(sequences), group.length, group.kind
            )
            self._ledger.call_raised(group.kind)
            unsound = None
        if unsound is None:
            if len(sequences) == 1:
                self._ledger.fail(sequences)
                return
            middle = len(sequences) // 2
            for half in (sequences[:middle], sequences[middle:]):
                self._read(replace(group, sequences=half))
            return
        self._ledger.judge(group.kind, len(sequences), len(unsound))
        self._ledger.fail(unsound)
        valid, metrics = int(lengths.sum()), self._metrics
        metrics.source_tokens.inc(valid)
        metrics.padding_tokens.inc(group.tokens - valid)
        metrics.batch_padding_ratio.observe(1 - valid / group.tokens)

    def _call(self, group: Group, ids: Ints, lengths: Ints) -> list[Sequence]:
        """One call of the model; those to whom it gave what is no number. Raises what the model does."""
        if group.kind == "generate":
            self._decoding.begin(group.sequences, ids, lengths)
            now = self._clock()
            for sequence in group.sequences:
                sequence.encoded_at = now
            return []  # a step will tell
        if group.kind == "score":
            return self._score(group, ids, lengths)
        memory = (self.runner.classify if group.kind == "classify" else self.runner.encode)(ids, lengths)
        unsound = []
        for sequence, vectors in zip(group.sequences, memory, strict=True):
            own = vectors[: len(sequence.source_ids)].copy()  # lets go of the padding
            if np.isfinite(own).all():
                self._ledger.finish(sequence, "stop", Encoded(own, self._ledger.timings(sequence)))
            else:
                unsound.append(sequence)
        return unsound

    def _score(self, group: Group, ids: Ints, lengths: Ints) -> list[Sequence]:
        targets = [sequence.target_ids or [] for sequence in group.sequences]
        target_ids, _ = pad(targets, group.target_length, self._pad_id)
        log_probabilities, _ = self.runner.score(ids, lengths, target_ids, alignment=False)
        unsound = []
        for sequence, target, row in zip(group.sequences, targets, log_probabilities, strict=True):
            own = row[: len(target)]
            if np.isnan(own).any():
                unsound.append(sequence)
            else:
                self._ledger.finish(sequence, "stop", Scored(own.tolist(), self._ledger.timings(sequence)))
        return unsound

    def __repr__(self) -> str:
        return f"<Core {self.scheduler!r}>"
