"""Clients share: who was served least goes first, whatever others have in line, and keeping quiet saves up nothing."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from service.fairness import STEP_COST, Accounts
from service.ladder import Ladder
from service.scheduler import Scheduler
from service.sequence import Sequence
from tests.service.fakes import Client

LADDER = Ladder([8, 16, 24, 32])
CLIENT = Client()


class Service:
    """A scheduler whose sequences run for so many steps as they have source tokens, and what each client got."""

    def __init__(self, max_rows: int, encode_tokens: int = 32) -> None:
        self.scheduler = Scheduler(max_rows=max_rows, encode_tokens=encode_tokens, source=LADDER, target=LADDER)
        self.left: dict[Sequence, int] = {}
        self.served: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.order: list[Sequence] = []

    def add(self, *sequences: Sequence) -> None:
        self.scheduler.add(sequences)

    def step(self) -> None:
        for group in self.scheduler.admit():
            for sequence in group.sequences:
                self.order.append(sequence)
                self.left[sequence] = len(sequence.source_ids) if sequence.rows else 0
                self.served[sequence.client] += sequence.tokens
        for sequence in list(self.left):
            if sequence.rows:
                self.served[sequence.client] += STEP_COST * sequence.rows
            self.left[sequence] -= 1
            if self.left[sequence] <= 0:
                del self.left[sequence]
                self.finished[sequence.client] += 1
                self.scheduler.finish(sequence)
        self.scheduler.check_integrity()

    def backlogged(self) -> set[str]:
        return {sequence.client for sequence in self.scheduler.all_waiting()}


def some(client: str, count: int, length: int = 8, beams: int = 1) -> list[Sequence]:
    return [CLIENT.generate([5] * length, num_beams=beams, client=client) for _ in range(count)]


def test_one_with_a_thousand_in_line_does_not_starve_one_with_a_few() -> None:
    """The few are done after about as many steps as it takes to get a row, not after the thousand."""
    service = Service(max_rows=8, encode_tokens=64)
    service.add(*some("heavy", 1000))
    for _ in range(20):
        service.step()
    service.add(*some("light", 4))
    for _ in range(2 * 8):
        service.step()
    assert service.finished["light"] == 4
    assert service.finished["heavy"] < 50


def test_without_names_it_is_first_in_first_out() -> None:
    service = Service(max_rows=2)
    sequences = [CLIENT.generate([5] * (1 + n % 7)) for n in range(40)]
    service.add(*sequences)
    while service.backlogged():
        service.step()
    assert service.order == sequences


def test_a_clients_own_are_first_in_first_out_too() -> None:
    service = Service(max_rows=3)
    ours, theirs = some("a", 20, 5), some("b", 20, 9)
    service.add(*[one for pair in zip(ours, theirs, strict=True) for one in pair])
    while service.backlogged():
        service.step()
    assert [one for one in service.order if one.client == "a"] == ours
    assert [one for one in service.order if one.client == "b"] == theirs


LINES = st.lists(st.tuples(st.integers(1, 32), st.sampled_from([0, 1, 1, 1, 2, 4])), min_size=40, max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.lists(LINES, min_size=2, max_size=4))
def test_clients_who_always_wait_get_the_same(lines: list[list[tuple[int, int]]]) -> None:
    """Theorem 4.4 of Sheng et al.: services differ by twice the most that can be under way, whatever they ask for."""
    rows, longest = 4, 32
    service = Service(max_rows=rows, encode_tokens=64)
    names = "abcd"[: len(lines)]
    for name, line in zip(names, lines, strict=True):
        for length, beams in line:
            ids = [5] * length
            service.add(
                CLIENT.generate(ids, num_beams=beams, client=name) if beams else CLIENT.encode(ids, client=name)
            )
    bound = 2 * max(64, STEP_COST * rows * longest)
    while service.backlogged() == set(names):
        service.step()
        served = [service.served[name] for name in names]
        assert max(served) - min(served) <= bound


def test_keeping_quiet_saves_up_nothing() -> None:
    """Who comes late has no claim to what others had before, and who was alone is not made to wait for it."""
    service = Service(max_rows=4, encode_tokens=64)
    service.add(*some("early", 400))
    for _ in range(400):
        service.step()
    before = service.served["early"]
    service.add(*some("late", 400))
    for _ in range(80):
        service.step()
    early, late = service.served["early"] - before, service.served["late"]
    assert abs(early - late) <= 2 * STEP_COST * 4 * 8


def test_encodings_are_shared_too() -> None:
    """They take no row; the budget of source tokens is what they share."""
    service = Service(max_rows=1, encode_tokens=16)
    service.add(*[CLIENT.encode([5] * 8, client="heavy") for _ in range(100)])
    service.add(*[CLIENT.encode([5] * 8, client="light") for _ in range(3)])
    for _ in range(4):
        service.step()
    assert service.finished["light"] == 3


def test_a_head_that_waits_for_many_rows_is_not_passed_by_another_client() -> None:
    """Whose turn it is decides first, then whether it fits: else one with many beams would wait for ever."""
    service = Service(max_rows=4)
    service.add(*some("busy", 3, 8))
    service.step()
    wide = some("wide", 1, 8, beams=4)
    service.add(*wide, *some("busy", 50, 8))
    for _ in range(8):
        service.step()
    assert wide[0] in service.order


def test_who_is_gone_is_forgotten() -> None:
    """As soon as it would start level again; so names that come once cost nothing for ever."""
    service = Service(max_rows=2)
    for number in range(50):
        service.add(*some(f"client-{number}", 1), *some("always", 2))
        for _ in range(30):
            service.step()
    assert len(service.scheduler._accounts) <= 3


def test_an_account_grows_by_rows_and_steps() -> None:
    accounts = Accounts()
    accounts.come("a")
    accounts.take("a", tokens=7, rows=3)
    assert accounts.served("a") == 7
    for _ in range(5):
        accounts.tick()
    assert accounts.served("a") == 7 + 5 * 3 * STEP_COST
    accounts.give_back("a", rows=3)
    accounts.tick()
    assert accounts.served("a") == 7 + 5 * 3 * STEP_COST
