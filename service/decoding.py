"""The decoding of the running rows: newcomers in, one step, what each sequence makes of it, rows out and rearranged.

Batch and state hold the same rows; they change together, here. If a step fails nobody knows what the buffers hold, so
all that were running fail with it and the buffers are made anew.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from service.arrangement import Arrangement
from service.batch import Batch, Ints, StepOutput, pad
from service.executes import Executes
from service.hypothesis import Outlook, SpecialIds
from service.ladder import Ladder
from service.ledger import Ledger
from service.search import endings, search_for
from service.sequence import Finished, Result, Sequence, Token
from service.state import State

log = logging.getLogger(__name__)


class Decoding:
    """The rows of one core."""

    def __init__(self, runner: Executes, state: State, batch: Batch, ledger: Ledger, source: Ladder) -> None:
        """`source`: the rungs to which sources are padded."""
        manifest = runner.manifest
        special = manifest.special_tokens
        self.state = state
        self.batch = batch
        self._runner = runner
        self._ledger = ledger
        self._metrics = ledger.metrics
        self._source_ladder = source
        self._target_ladder = Ladder.of_lengths(manifest.max_target_tokens)
        self._k_ladder = Ladder.of_counts(manifest.vocab_size)
        self._pad_id = special.pad_id
        self._special = SpecialIds(special.bos_id, special.eos_id, (special.pad_id, special.bos_id))
        self._max_target_tokens = manifest.max_target_tokens
        self._last_token_at = 0.0

    def begin(self, sequences: list[Sequence], ids: Ints, lengths: Ints) -> None:
        """Encode newcomers, ids (rows, length), into the rows after those in use. Raises what the encoder does."""
        if not self._reserve(source=ids.shape[1]):
            raise MemoryError("no memory for the newcomers' state")
        self._runner.encode_into(self.state, ids, lengths)
        for sequence in sequences:
            assert sequence.parameters is not None
            sequence.search = search_for(sequence.parameters, self._special, self._max_target_tokens)
        self.state.append(len(sequences))
        self.batch.append(sequences)

    def step(self) -> StepOutput | None:
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
            return self._runner.step(batch, self.state, self._k_ladder.rung(min(k, self._k_ladder.last)), logits)
        except Exception:
            log.exception("the decoder failed on a step of %d rows", batch.rows)
            self._ledger.call_raised("step")
            self._fail_all()
            return None

    def take(self, output: StepOutput, oldest_newcomer: int, now: float) -> None:
        """Every sequence takes what the step offers. Rows from `oldest_newcomer` on took their first step."""
        batch = self.batch
        unsound = self._unsound(output)
        ids = output.ids[:, 0]
        leaving = endings(batch, ids, eos_id=self._special.eos, now=now)
        batch.take(ids, output.log_probabilities[:, 0])
        self._measure(oldest_newcomer, now)
        move = Arrangement(batch.sequences)
        for sequence in unsound:
            move.leave(sequence)
        self._ledger.fail(unsound)
        for row in batch.streams[: batch.rows].nonzero()[0].tolist():
            if batch.sequences[row] not in move.left:
                self._ledger.tell(batch.sequences[row], Token(int(ids[row]), float(output.log_probabilities[row, 0])))
        for row, reason in leaving.items():
            sequence = batch.sequences[row]
            if sequence in move.left:
                continue
            move.leave(sequence)
            self._answer(sequence, [Result(*batch.result(row), reason)])
        if batch.searching:
            self._search(output, move, now)
        self._carry_out(move)
        for sequence in batch.searching:
            assert sequence.search is not None
            batch.feed(sequence, sequence.search.last_ids)

    def _unsound(self, output: StepOutput) -> list[Sequence]:
        """The sequences to which the step gave what is no number. Their rows become zero: what is no number would get
        through every mask to whoever has the place after them.

        The candidates' log-probabilities are relative to the sum over the vocabulary, so the first one shows them all.
        """
        batch = self.batch
        rows = np.flatnonzero(np.isnan(output.log_probabilities[:, 0]))
        self._ledger.judge("step", batch.rows, rows.size)
        if not rows.size:
            return []
        unsound = list(dict.fromkeys(batch.sequences[row] for row in rows))
        self.state.wipe([row for sequence in unsound for row in sequence.held])
        return unsound

    def leave(self, sequences: list[Sequence]) -> None:
        """They give up their rows."""
        move = Arrangement(self.batch.sequences)
        for sequence in sequences:
            move.leave(sequence)
        self._carry_out(move)

    def forget(self) -> None:
        """Drop all rows and begin anew with fresh buffers."""
        self.batch.clear()
        self.state.clear()
        self.state.renew()

    def check_integrity(self, rows_set_aside: int) -> None:
        """Raises RuntimeError with the numbers if rows were lost or counted twice."""
        batch = self.batch
        rows = (batch.rows, self.state.rows, len(batch.sequences))
        if len(set(rows)) != 1 or batch.rows > rows_set_aside:
            raise RuntimeError(
                f"rows in use by batch, state and sequences differ, or are above those set aside: {rows}, "
                f"{rows_set_aside}"
            )
        for sequence in dict.fromkeys(batch.sequences):
            if len(sequence.held) > sequence.rows or any(batch.sequences[row] is not sequence for row in sequence.held):
                raise RuntimeError(f"{sequence} says it holds the rows {sequence.held}, the batch does not")

    def _search(self, output: StepOutput, move: Arrangement, now: float) -> None:
        """Every sequence with a search of its own takes its step."""
        ids, log_probabilities = output.ids.tolist(), output.log_probabilities.tolist()
        for sequence in self.batch.searching:
            if sequence in move.left:
                continue
            search, held = sequence.search, sequence.held
            assert search is not None
            logits = output.logits[held] if output.logits is not None and search.wants_logits else None
            try:
                parents = search.advance(
                    Outlook([ids[row] for row in held], [log_probabilities[row] for row in held], logits)
                )
                if sequence.stream:
                    for result, id, value in search.certain():
                        self._ledger.tell(sequence, Token(id, value, result))
                late = sequence.deadline is not None and sequence.deadline <= now
                results = search.results() if search.done or late else None
            except Exception:
                log.exception("the search of a sequence failed")
                move.leave(sequence)
                self._ledger.fail([sequence])
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
                self._ledger.call_raised("align")
                self._ledger.fail([sequence])
                return
            unsound = any(result.alignment is not None and np.isnan(result.alignment).any() for result in results)
            self._ledger.judge("align", 1, int(unsound))
            if unsound:
                self._ledger.fail([sequence])
                return
        self._ledger.finish(sequence, results[0].reason, Finished(results, self._ledger.timings(sequence)))

    def _aligned(self, sequence: Sequence, result: Result) -> Result:
        """With attention weights, from one pass over the finished text."""
        assert sequence.parameters is not None
        prefix, size = sequence.parameters.prefix_ids, len(sequence.source_ids)
        target = [*prefix, *result.ids]
        if not result.ids:
            return replace(result, alignment=np.empty((0, size), np.float32))
        source_ids, lengths = pad([sequence.source_ids], self._source_ladder.rung(size), self._pad_id)
        target_ids, _ = pad([target], self._target_ladder.rung(len(target)), self._pad_id)
        _, alignment = self._runner.score(source_ids, lengths, target_ids, alignment=True)
        assert alignment is not None
        return replace(result, alignment=alignment[0, len(prefix) : len(target), :size].copy())

    def _carry_out(self, move: Arrangement) -> None:
        """Rows leave, branch and move: in the batch and in the state."""
        if not move.close():
            return
        batch, order = self.batch, move.order
        moved = order[order != np.arange(len(order))]
        source = self._source_ladder.rung(int(batch.source_lengths[moved].max())) if moved.size else 0
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
            self._ledger.call_raised("allocate")
            self._fail_all()
            return False
        return True

    def _fail_all(self) -> None:
        sequences = list(dict.fromkeys(self.batch.sequences))
        self.forget()
        self._ledger.fail(sequences)

    def __repr__(self) -> str:
        return f"<Decoding {self.batch.rows} rows>"
