"""The scheduler decides who waits, who is worked on and who has to leave. Pure: no I/O, no clock of its own.

Policy. First in, first out, for each client; of several clients the one that was served least (`fairness`). Between two
decoder steps newcomers are encoded up to a budget of source tokens, so the running rows wait for at most one budget of
encoding per token, and newcomers get in at every step: neither starves. At least one is always admitted if there is
room, however long it is. A newcomer's cost is its own length, whoever comes with it: the encoder computes tokens, and
only its attention, a small part for short texts, works on padded rows. So lengths that share an encoder call are those
within a factor of two.

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

from service.fairness import Accounts
from service.ladder import Ladder
from service.sequence import Kind, Sequence, Stage
from service.tally import Tally

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
        self.left_line = Tally()
        """Sequences that do not wait any more. Other threads read it."""
        self.finished = 0
        """Sequences that left, from the line or from their rows."""
        # By whether they need rows, and by client; each with the number of its arrival.
        self._lines: dict[bool, dict[str, OrderedDict[Sequence, int]]] = {True: {}, False: {}}
        self._accounts = Accounts()
        self._running: set[Sequence] = set()
        self._next_deadline = math.inf  # no waiting sequence has an earlier one
        self._held = 0  # how often newcomers with rows were held back since the last were let in

    @property
    def waiting(self) -> int:
        """Sequences in line."""
        return sum(len(own) for line in self._lines.values() for own in line.values())

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
            client = sequence.client
            if not any(client in line for line in self._lines.values()):
                self._accounts.come(client)
            self._lines[sequence.rows > 0].setdefault(client, OrderedDict())[sequence] = self.added
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
        self._accounts.tick()
        with_rows = not self._wait_for_company()
        groups: dict[tuple[Kind, int, int], Group] = {}
        spent = 0
        while (sequence := self._next_that_fits(with_rows)) is not None:
            length = len(sequence.source_ids)
            target_length = 0 if sequence.target_ids is None else self._target.rung(len(sequence.target_ids))
            if spent and spent + length + target_length > self.encode_tokens:
                break
            spent += length + target_length
            self._accounts.take(sequence.client, sequence.tokens, sequence.rows)
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
            self._accounts.give_back(sequence.client, sequence.rows)
            self._forget(sequence.client)
        sequence.stage = Stage.DONE
        self.finished += 1

    def all_waiting(self) -> list[Sequence]:
        """Everyone in line, the oldest of each client's first."""
        return [sequence for line in self._lines.values() for own in line.values() for sequence in own]

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
        left = self.left_line.all.inputs
        if self.added != self.waiting + self.running + self.finished or left != self.added - self.waiting:
            raise RuntimeError(
                f"{self.added} sequences came, {self.waiting} wait, {self.running} run, {self.finished} are finished, "
                f"{left} left the line"
            )

    def _leave_line(self, sequence: Sequence) -> None:
        line, client = self._lines[sequence.rows > 0], sequence.client
        del line[client][sequence]
        if not line[client]:
            del line[client]
            self._forget(client)
        self.left_line.add(sequence)

    def _forget(self, client: str) -> None:
        if not any(client in line for line in self._lines.values()):
            self._accounts.go(client)

    def _wait_for_company(self) -> bool:
        """Whether those who need rows had better come in later."""
        head = self._head(True)
        waiting = sum(map(len, self._lines[True].values()))
        could_come = 0 if head is None else min(waiting, self.rows_free // head[1].rows)
        wait = 0 < could_come * _COMPANY < self.running and self._held < _MOST_HELD
        if could_come:
            self._held = self._held + 1 if wait else 0
        return wait

    def _next_that_fits(self, with_rows: bool) -> Sequence | None:
        heads = [self._head(needs_rows) for needs_rows in self._lines if with_rows or not needs_rows]
        fitting = [head for head in heads if head is not None and head[1].rows <= self.rows_free]
        return min(fitting, default=(None, None), key=lambda head: head[0])[1]

    def _head(self, needs_rows: bool) -> tuple[tuple[int, int], Sequence] | None:
        """Whose turn it is in a line, with what decides it: what the client was served, and who came first."""
        turns = []
        for client, own in self._lines[needs_rows].items():
            sequence, arrival = next(iter(own.items()))
            turns.append(((self._accounts.served(client), arrival), sequence))
        return min(turns, default=None, key=lambda turn: turn[0])

    def __repr__(self) -> str:
        return (
            f"<Scheduler {self.running} running, {self.waiting} waiting, {self.rows_set_aside} of {self.max_rows} rows>"
        )
