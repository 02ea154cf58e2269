"""Who may stand in line: bounds of inputs, tokens and seconds, a share for each client, and when to come back."""

from __future__ import annotations

import contextlib

import pytest

from service.admission import Admission
from service.errors import QueueFull, TooLarge
from service.sequence import Sequence
from service.settings import Settings
from service.tally import Load, Tally
from tests.service.fakes import Client

CLIENT = Client()


class Line:
    """An admission, and a worker that takes from the line what it is told to."""

    def __init__(self, **limits: float) -> None:
        self.left = Tally()
        self.now = 0.0
        self.admission = Admission(Settings(**limits), lambda: [self.left])  # type: ignore[arg-type]
        self.waiting: list[Sequence] = []

    def come(self, count: int, tokens: int = 10, client: str = "") -> None:
        """Raises what admission raises."""
        self.admission.require_room(Load(count, count * tokens), client, self.now)
        sequences = [CLIENT.generate([5] * tokens, client=client) for _ in range(count)]
        self.admission.add(sequences)
        self.waiting += sequences

    def leave(self, count: int) -> None:
        for sequence in self.waiting[:count]:
            self.left.add(sequence)
        del self.waiting[:count]


def test_the_line_is_bounded_in_inputs_and_in_tokens() -> None:
    line = Line(max_queue=8, max_queue_tokens=100)
    line.come(6)
    with pytest.raises(QueueFull, match="6 of 8 inputs wait, 60 of 100 tokens"):
        line.come(3)
    with pytest.raises(QueueFull, match="6 of 8 inputs wait, 60 of 100 tokens"):
        line.come(1, tokens=41)
    line.come(2, tokens=20)
    assert line.admission.waiting == Load(8, 100)
    line.leave(8)
    assert line.admission.waiting == Load()
    line.come(8)


def test_what_the_line_could_never_hold_is_too_large() -> None:
    line = Line(max_queue=8, max_queue_tokens=100)
    with pytest.raises(TooLarge, match="9 inputs"):
        line.come(9, tokens=1)
    with pytest.raises(TooLarge, match=r"1 inputs of 101 tokens .* split the call"):
        line.come(1, tokens=101)
    with pytest.raises(TooLarge, match="for one client"):
        line.come(5, tokens=1, client="a")


def test_a_target_to_be_scored_counts_too() -> None:
    assert CLIENT.score([5] * 3, [6] * 4).tokens == 7
    assert CLIENT.encode([5] * 3).tokens == 3


def test_one_client_leaves_room_for_the_next() -> None:
    """Alone it has half of the line; a second one a half of what is left, and so on; what leaves makes room again."""
    line = Line(max_queue=80)
    line.come(40, client="a")
    with pytest.raises(QueueFull, match=r"your share of the line is full: 40 inputs .* of yours wait, 40 inputs"):
        line.come(1, client="a")
    line.come(20, client="b")
    with pytest.raises(QueueFull, match="your share"):
        line.come(1, client="b")
    line.come(10, client="c")
    line.leave(40)
    line.come(1, client="a")
    line.come(5, client="b")


def test_two_equally_busy_clients_have_a_third_each() -> None:
    line = Line(max_queue=90)
    for client in ["a", "b"] * 60:
        try:
            line.come(1, client=client)
        except QueueFull:
            continue
    assert line.admission.waiting_of("a") == line.admission.waiting_of("b") == Load(30, 300)


def test_when_to_come_back_is_when_the_line_will_have_moved() -> None:
    line = Line(max_queue=100)
    line.come(100)
    with pytest.raises(QueueFull) as caught:
        line.come(1)
    assert caught.value.retry_after == 1, "nothing is known of its pace yet"
    for _ in range(6):
        line.now += 1.0
        line.leave(5)
        with pytest.raises(QueueFull):
            line.come(6)
        line.come(5)
    with pytest.raises(QueueFull) as caught:
        line.come(1)
    assert caught.value.retry_after == 20, "100 wait, 5 leave each second"
    for _ in range(20):
        line.now += 1.0
        with pytest.raises(QueueFull) as caught:
            line.come(1)
    assert caught.value.retry_after == 60, "it stands still"


def test_a_line_may_be_bounded_in_seconds() -> None:
    """What would wait too long is refused though there is room; what has nothing before it never is."""
    line = Line(max_queue=1000, max_wait=2.0)
    line.come(50, client="a")
    line.now = 0.5
    line.leave(5)
    with pytest.raises(QueueFull, match=r"the wait would be 4\.5 s, the limit is 2 s") as caught:
        line.come(1, client="a")
    assert caught.value.retry_after == 5, "45 wait, 10 leave each second"
    line.come(1, client="b")
    line.leave(30)
    line.come(1, client="a")


def test_a_time_in_which_nobody_waited_tells_nothing_of_the_pace() -> None:
    """Ten seconds without work are no slow line."""
    line = Line(max_queue=100, max_wait=1.0)
    for _ in range(4):
        line.come(10)
        line.now += 0.3
        line.leave(5)
        line.come(1)
        line.leave(6)
        line.now += 10.0
        line.come(0)
    line.come(10)
    line.come(1)


def test_a_pace_that_was_low_once_is_not_believed_for_ever() -> None:
    """A step that took long when a crowd came lets nothing leave the line for a moment. Later the worker takes all that
    waits, ten at a time if they are let in, so that the line is empty again and again: nothing there is to wait for.
    """
    line = Line(max_queue=1000, max_wait=1.0)
    for _ in range(120):
        with contextlib.suppress(QueueFull):
            line.come(1)
        line.now += 0.0025
    line.leave(10)
    most = 0
    for _ in range(500):
        for _ in range(40):
            with contextlib.suppress(QueueFull):
                line.come(1)
            line.now += 0.00025
        most = min(10, len(line.waiting))
        line.leave(10)
    assert most == 10
