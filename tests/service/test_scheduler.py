"""The scheduler's promises, checked against a plain model under any order of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from service.ladder import Ladder
from service.scheduler import Scheduler
from service.sequence import Sequence, Stage
from tests.service.fakes import Client

LADDER = Ladder([8, 16, 24, 32])
CLIENT = Client()
MAX_ROWS = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Sequences come, expire, are cancelled, are admitted and finish, in any order."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_rows=MAX_ROWS, encode_tokens=32, source=LADDER, target=LADDER)
        self.now = 0.0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.came = 0
        self.held = 0

    @rule(
        target=sequences,
        length=st.integers(1, 32),
        encode=st.booleans(),
        patience=st.none() | st.floats(0, 5, allow_nan=False),
    )
    def add(self, length: int, encode: bool, patience: float | None) -> Sequence:
        deadline = None if patience is None else self.now + patience
        sequence = (CLIENT.encode if encode else CLIENT.generate)([5] * length, deadline=deadline)
        self.scheduler.add([sequence])
        self.waiting.append(sequence)
        self.came += 1
        return sequence

    @rule(seconds=st.floats(0, 3, allow_nan=False))
    def expire(self, seconds: float) -> None:
        """Exactly those leave the line whose time is over, in the order of their lines."""
        self.now += seconds
        expired = self.scheduler.expired(self.now)
        for sequence in expired:
            self.scheduler.finish(sequence)
        over = [s for s in self.waiting if s.deadline is not None and s.deadline <= self.now]
        assert set(expired) == set(over)
        assert len(expired) == len(over)
        self.waiting = [sequence for sequence in self.waiting if sequence not in over]

    @rule()
    def admit(self) -> None:
        """The oldest go first, within both budgets, in groups of similar lengths, padded to the longest.

        Those who need rows wait up to four steps if they are fewer than a fourth of those that run.
        """
        free = MAX_ROWS - sum(sequence.rows for sequence in self.running)
        fitting = min(free, sum(sequence.rows > 0 for sequence in self.waiting))
        few = 0 < fitting < len(self.running) / 4 and self.held < 4
        if fitting:
            self.held = self.held + 1 if few else 0
        expected, spent = [], 0
        for sequence in self.waiting:
            if sequence.rows > (0 if few else free):
                continue  # every later one of its kind finds no row either
            cost = len(sequence.source_ids)
            if expected and spent + cost > 32:
                break
            expected.append(sequence)
            spent += cost
            free -= sequence.rows
        groups = self.scheduler.admit()
        admitted = [sequence for group in groups for sequence in group.sequences]
        assert sorted(map(id, admitted)) == sorted(map(id, expected))
        for group in groups:
            assert {sequence.kind for sequence in group.sequences} == {group.kind}
            lengths = [len(sequence.source_ids) for sequence in group.sequences]
            assert group.length == LADDER.rung(max(lengths))
            assert max(lengths) <= 16 or min(lengths) > 16
            assert sorted(group.sequences, key=expected.index) == group.sequences
        assert len({(group.kind, group.length > 16) for group in groups}) == len(groups)
        self.waiting = [sequence for sequence in self.waiting if sequence not in expected]
        self.running += expected

    @rule(sequence=consumes(sequences))
    def finish(self, sequence: Sequence) -> None:
        """Wherever a sequence is, it can leave; its rows are free at once."""
        if sequence.stage is Stage.DONE:
            return
        self.scheduler.finish(sequence)
        for place in (self.waiting, self.running):
            if sequence in place:
                place.remove(sequence)

    @invariant()
    def books_balance(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        assert scheduler.waiting == len(self.waiting)
        assert scheduler.running == len(self.running)
        assert scheduler.added == self.came
        assert scheduler.idle == (not self.waiting and not self.running)
        assert set(scheduler.all_waiting()) == set(self.waiting)

    @invariant()
    def nobody_starves(self) -> None:
        """If rows are free, admitting would take the oldest of all, whatever it costs."""
        if self.waiting and self.scheduler.rows_free:
            assert self.scheduler._next_that_fits(with_rows=True) is self.waiting[0]


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def _scheduler(**changes: int) -> Scheduler:
    return Scheduler(**{"max_rows": 2, "encode_tokens": 16, "source": LADDER, "target": LADDER, **changes})  # type: ignore[arg-type]


def test_one_is_admitted_even_if_it_is_above_the_budget() -> None:
    """A budget smaller than a text must not stall the line."""
    scheduler = _scheduler(encode_tokens=1)
    scheduler.add([CLIENT.generate([5] * 32), CLIENT.generate([5])])
    assert [group.length for group in scheduler.admit()] == [32]
    assert repr(scheduler) == "<Scheduler 1 running, 1 waiting, 1 of 2 rows>"
    assert [group.length for group in scheduler.admit()] == [8]


def test_a_long_one_at_the_head_is_not_passed_by_short_ones() -> None:
    """First in, first out, although the short one would fit into what is left of the budget."""
    scheduler = _scheduler(encode_tokens=24, max_rows=3)
    first, long, short = (CLIENT.generate([5] * length) for length in (8, 24, 8))
    scheduler.add([first, long, short])
    assert [group.sequences for group in scheduler.admit()] == [[first]]
    assert [group.sequences for group in scheduler.admit()] == [[long]]
    assert [group.sequences for group in scheduler.admit()] == [[short]]


def test_encodings_pass_those_who_wait_for_a_row() -> None:
    """An encoding needs no row, so it does not wait for one; a row that becomes free goes to who waits for it."""
    scheduler = _scheduler(max_rows=1)
    running, waits = CLIENT.generate([5]), CLIENT.generate([5])
    passing, later = CLIENT.encode([5]), CLIENT.encode([5] * 16)
    scheduler.add([running, waits, passing])
    assert {sequence for group in scheduler.admit() for sequence in group.sequences} == {running, passing}
    scheduler.finish(running)
    scheduler.add([later])
    assert [group.sequences for group in scheduler.admit()] == [[waits]]


def test_a_newcomer_beside_many_waits_for_company_but_not_for_long() -> None:
    """Four steps at most, and no step once they are a fourth of those that run."""
    scheduler = _scheduler(max_rows=16, encode_tokens=64)
    scheduler.add([CLIENT.generate([5]) for _ in range(8)])
    assert sum(len(group.sequences) for group in scheduler.admit()) == 8
    alone = CLIENT.generate([5])
    scheduler.add([alone])
    assert [scheduler.admit() for _ in range(4)] == [[], [], [], []]
    assert [group.sequences for group in scheduler.admit()] == [[alone]]
    pair = [CLIENT.generate([5]), CLIENT.generate([5])]
    scheduler.add(pair[:1])
    assert scheduler.admit() == []
    scheduler.finish(next(iter(set(scheduler.all_running()) - {alone})))
    scheduler.add(pair[1:])
    assert [group.sequences for group in scheduler.admit()] == [pair]


def test_beside_few_a_newcomer_comes_at_once() -> None:
    """An idle service does not let anybody wait."""
    scheduler = _scheduler(max_rows=16)
    for _ in range(5):
        scheduler.add([CLIENT.generate([5])])
        assert len(scheduler.admit()) == 1


def test_encodings_wait_for_no_company() -> None:
    """They take no row, so no step is dearer for them."""
    scheduler = _scheduler(max_rows=16, encode_tokens=64)
    scheduler.add([CLIENT.generate([5]) for _ in range(8)])
    scheduler.admit()
    scheduler.add([CLIENT.generate([5]), passing := CLIENT.encode([5])])
    assert [group.sequences for group in scheduler.admit()] == [[passing]]


def test_broken_books_are_reported_with_the_numbers() -> None:
    """An error of bookkeeping is not carried on with."""
    scheduler = _scheduler()
    scheduler.rows_set_aside = 1
    with pytest.raises(RuntimeError, match=r"0 rows are set aside .* the books say 1 of 2"):
        scheduler.check_integrity()
    scheduler = _scheduler()
    scheduler.added = 3
    with pytest.raises(RuntimeError, match="3 sequences came, 0 wait, 0 run, 0 are finished"):
        scheduler.check_integrity()
