"""The scheduler decides who waits, who is worked on and who has to leave. Pure: no I/O, no clock of its own.

Policy. First in, first out. Between two decoder steps newcomers are encoded up to a budget of source tokens, so the
running rows wait for at most one budget of encoding per token, and newcomers get in at every step: neither starves. At
least one is always admitted if there is room, however long it is. A newcomer's cost is its own length, whoever comes
with it: the encoder computes tokens, and only its attention, a small part for short texts, works on padded rows. So
lengths that share an encoder call are those within a factor of two.

An encoder call reads all of the encoder's weights, for however few tokens. So newcomers who would be few beside those
that run wait for company, some steps at most; a row that is free meanwhile costs less than the calls that are saved.

A sequence that searches has as many rows set aside from the beginning as it may come to need, so it never has to wait
half-way. Encodings and scores need no row. So there are two lines, and when all rows are taken those without pass
those who wait for rows: they delay them by nothing, since a row that becomes free goes to the oldest in line, before
younger ones without rows spend the budget.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from service.ladder import Ladder
from service.sequence import Kind, Sequence, Stage

_SHORT = 16
"""Sources up to this length share a call, however short."""

_COMPANY = 4
"""Newcomers are few if they are less than one for so many running sequences."""

_MOST_HELD = 4
"""Steps that newcomers wait for company at most."""


@dataclass(slots=True)
class Group:
    """Newcomers that one encoder call takes: of one kind, of similar lengths, and one length of their targets."""

    kind: Kind
    length: int
    """To which they are padded: the rung of the longest of them."""
    target_length: int
    """Of kind score; else 0."""
    sequences: list[Sequence]

    @property
    def tokens(self) -> int:
        """Padded source tokens."""
        return self.length * len(self.sequences)


class Scheduler:
    """The lines and the rows, as numbers."""

    def __init__(self, *, max_rows: int, encode_tokens: int, source: Ladder, target: Ladder) -> None:
        self.max_rows = max_rows
        self.encode_tokens = encode_tokens
        self._source = source
        self._target = target
        self._similar = Ladder.of_capacities(source.last, smallest=_SHORT)
        self.rows_set_aside = 0
        self.added = 0
        """Sequences ever added."""
        self.left_line = 0
        """Sequences that do not wait any more. One number, so that another thread may read it."""
        self.finished = 0
        """Sequences that left, from the line or from their rows."""
        self._lines: dict[bool, OrderedDict[Sequence, int]] = {True: OrderedDict(), False: OrderedDict()}  # needs rows?
        self._running: set[Sequence] = set()
        self._next_deadline = math.inf  # no waiting sequence has an earlier one
        self._held = 0  # how often newcomers with rows were held back since the last were let in

    @property
    def waiting(self) -> int:
        """Sequences in line."""
        return sum(map(len, self._lines.values()))

    @property
    def running(self) -> int:
        """Sequences that are worked on."""
        return len(self._running)

    @property
    def rows_free(self) -> int:
        """Rows that are set aside for nobody."""
        return self.max_rows - self.rows_set_aside

    @property
    def idle(self) -> bool:
        """Nobody waits, nobody is worked on."""
        return not self._running and not self.waiting

    def add(self, sequences: Iterable[Sequence]) -> None:
        """To the end of the line. A sequence takes `max_rows` rows at most."""
        for sequence in sequences:
            assert sequence.rows <= self.max_rows
            sequence.stage = Stage.WAITING
            self._lines[sequence.rows > 0][sequence] = self.added
            self.added += 1
            if sequence.deadline is not None:
                self._next_deadline = min(self._next_deadline, sequence.deadline)

    def expired(self, now: float) -> list[Sequence]:
        """Those whose deadline came while they waited. They are in line until they are finished."""
        if now < self._next_deadline:
            return []
        hurried = [(s.deadline, s) for s in self.all_waiting() if s.deadline is not None]
        self._next_deadline = min((deadline for deadline, _ in hurried if deadline > now), default=math.inf)
        return [sequence for deadline, sequence in hurried if deadline <= now]

    def admit(self) -> list[Group]:
        """Take from the line what fits into the free rows and the budget. They are running from now on.

        To be called once for each step: who waits for company waits for a number of calls.
        """
        with_rows = not self._wait_for_company()
        groups: dict[tuple[Kind, int, int], Group] = {}
        spent = 0
        while (sequence := self._oldest_that_fits(with_rows)) is not None:
            length = len(sequence.source_ids)
            target_length = 0 if sequence.target_ids is None else self._target.rung(len(sequence.target_ids))
            if spent and spent + length + target_length > self.encode_tokens:
                break
            spent += length + target_length
            self._leave_line(sequence)
            sequence.stage = Stage.RUNNING
            self._running.add(sequence)
            self.rows_set_aside += sequence.rows
            key = (sequence.kind, self._similar.rung(length), target_length)
            group = groups.setdefault(key, Group(sequence.kind, 0, target_length, []))
            group.sequences.append(sequence)
            group.length = max(group.length, self._source.rung(length))
        return list(groups.values())

    def finish(self, sequence: Sequence) -> None:
        """It is done, for whatever reason and wherever it is: it leaves the line, or its rows become free."""
        if sequence.stage is Stage.WAITING:
            self._leave_line(sequence)
        else:
            self._running.remove(sequence)
            self.rows_set_aside -= sequence.rows
        sequence.stage = Stage.DONE
        self.finished += 1

    def all_waiting(self) -> list[Sequence]:
        """Everyone in line, the oldest of each line first."""
        return [sequence for line in self._lines.values() for sequence in line]

    def all_running(self) -> list[Sequence]:
        """Everyone who is worked on, in no order."""
        return list(self._running)

    def check_integrity(self) -> None:
        """Raises RuntimeError with the numbers if the books do not balance."""
        rows = sum(sequence.rows for sequence in self._running)
        if rows != self.rows_set_aside or self.rows_set_aside + self.rows_free != self.max_rows or self.rows_free < 0:
            raise RuntimeError(
                f"{rows} rows are set aside for those that run, the books say {self.rows_set_aside} of {self.max_rows}"
            )
        if self.added != self.waiting + self.running + self.finished or self.left_line != self.added - self.waiting:
            raise RuntimeError(
                f"{self.added} sequences came, {self.waiting} wait, {self.running} run, {self.finished} are finished, "
                f"{self.left_line} left the line"
            )

    def _leave_line(self, sequence: Sequence) -> None:
        del self._lines[sequence.rows > 0][sequence]
        self.left_line += 1

    def _wait_for_company(self) -> bool:
        """Whether those who need rows had better come in later."""
        line = self._lines[True]
        could_come = min(len(line), self.rows_free // next(iter(line)).rows) if line else 0
        wait = 0 < could_come * _COMPANY < self.running and self._held < _MOST_HELD
        if could_come:
            self._held = self._held + 1 if wait else 0
        return wait

    def _oldest_that_fits(self, with_rows: bool) -> Sequence | None:
        lines = [line for needs_rows, line in self._lines.items() if with_rows or not needs_rows]
        heads = [(line[head], head) for line in lines if (head := next(iter(line), None)) is not None]
        heads = [(arrival, head) for arrival, head in heads if head.rows <= self.rows_free]
        return min(heads, default=(0, None), key=lambda entry: entry[0])[1]

    def __repr__(self) -> str:
        return (
            f"<Scheduler {self.running} running, {self.waiting} waiting, {self.rows_set_aside} of {self.max_rows} rows>"
        )
