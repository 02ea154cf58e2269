"""The load generator's arithmetic: which requests, when, what counts, what it says."""

from __future__ import annotations

import io
import itertools
import statistics
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from service.bench.exposition import server_figures
from service.bench.picture import draw
from service.bench.report import NOT_SENT, Reply, Run, Spread, Window, summarise
from service.bench.table import table
from service.bench.workload import Clients, Rate, Workload, read_texts
from service.metrics import Families


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 9))
def test_every_text_is_sent_once_before_any_is_sent_twice(texts: int, inputs: int, seed: int) -> None:
    """In an order that the seed alone decides, whatever the number of inputs in a request."""
    workload = Workload(texts=[str(n) for n in range(texts)], requests=1, inputs_per_request=inputs, seed=seed)
    drawn = list(itertools.islice(itertools.chain.from_iterable(workload.draw()), 3 * texts))
    assert [len(request) for request in itertools.islice(workload.draw(), 3)] == [inputs] * 3
    for start in range(0, 3 * texts, texts):
        assert sorted(drawn[start : start + texts]) == sorted(workload.texts)
    assert drawn == list(itertools.islice(itertools.chain.from_iterable(workload.draw()), 3 * texts))


def test_arrivals_are_poisson() -> None:
    """Gaps have the mean that the rate says, are spread as much as their mean, and do not depend on one another."""
    arrivals = list(itertools.islice(Workload(texts=["a"], requests=1).arrivals(Rate(50.0)), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *arrivals])]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert abs(statistics.correlation(gaps[1:], gaps[:-1])) < 0.03


@pytest.mark.parametrize(
    "wrong",
    [
        {"texts": []},
        {"requests": None},
        {"duration": 1.0},
        {"requests": 0},
        {"requests": None, "duration": float("inf")},
        {"warm_up": -1},
        {"inputs_per_request": 0},
        {"max_in_flight": 0},
    ],
)
def test_a_workload_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Workload(**{"texts": ["a"], "requests": 1, **wrong})


@pytest.mark.parametrize("wrong", [lambda: Clients(0), lambda: Rate(0), lambda: Rate(float("nan"))])
def test_a_load_of_nothing_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="has to be"):
        wrong()


def test_the_warm_up_follows_the_load_unless_it_is_said() -> None:
    """Two requests of each client; the arrivals of two seconds."""
    workload = Workload(texts=["a"], requests=1)
    assert (workload.warm_up_of(Clients(64)), workload.warm_up_of(Rate(2.4))) == (128, 5)
    assert Workload(texts=["a"], requests=1, warm_up=0).warm_up_of(Clients(64)) == 0


def test_a_line_is_a_text() -> None:
    """Blank lines are none; what Python also takes for the end of a line is part of it."""
    assert read_texts(io.BytesIO("a\r\n\n  \nb\u2028c\nd".encode())) == ["a", "b\u2028c", "d"]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_percentiles_are_values_that_were_measured(values: list[float]) -> None:
    """The smallest that this share of the values does not exceed."""
    spread = Spread.of(values)
    assert spread is not None
    for share, found in ((0.5, spread.p50), (0.95, spread.p95), (0.99, spread.p99)):
        assert found in values
        assert sum(value <= found for value in values) >= share * len(values)
        assert sum(value < found for value in values) < share * len(values)
    assert spread.max == max(values)
    assert spread.mean == pytest.approx(statistics.mean(values))


def test_no_values_have_no_spread() -> None:
    assert Spread.of([]) is None


def pages() -> tuple[str, str]:
    """The metrics of a server, before and after ten steps of 1 to 10 rows and one encoder call."""
    registry = CollectorRegistry()
    metrics = Families(registry).of("any")
    metrics.batch_rows.observe(500)
    metrics.source_tokens.inc(1000)
    metrics.time_to_first_token.observe(9)
    before = generate_latest(registry).decode()
    for rows in range(1, 11):
        metrics.batch_rows.observe(rows)
    metrics.source_tokens.inc(75)
    metrics.padding_tokens.inc(25)
    metrics.time_to_first_token.observe(0.2)
    metrics.time_to_first_token.observe(0.4)
    return before, generate_latest(registry).decode()


def test_a_servers_figures_are_of_the_time_between() -> None:
    """From the very metrics that this service has."""
    figures = server_figures(*pages())
    assert figures.steps == 10
    assert figures.rows_per_step == 5.5
    assert figures.padding_share == 0.25
    assert figures.first_token_seconds == pytest.approx(0.3)
    assert figures.cpu_seconds is not None
    assert figures.resident_bytes is not None
    assert figures.resident_bytes > 2**20


def test_what_a_server_does_not_tell_is_not_made_up() -> None:
    """Metrics of another server, of one that was started anew, or no metrics at all; nothing done between."""
    before, after = pages()
    nothing = dict.fromkeys(("steps", "rows_per_step", "padding_share", "first_token_seconds", "cpu_seconds"))
    for first, second in (("a_total 1\n", "a_total 2\n"), ("", ""), ("<html>", "{"), (before, "")):
        assert server_figures(first, second).model_dump() == {**nothing, "resident_bytes": None}
    assert server_figures(after, before).rows_per_step is None
    idle = server_figures(after, after)
    assert (idle.steps, idle.rows_per_step, idle.padding_share) == (0, None, None)


def reply(due: float, ended: float, failure: str | None = None, **more: Any) -> Reply:
    return Reply(due, due + 0.5, None, ended, 2, 7, 3, failure, **more)


WINDOW = Window(opened=10.0, closed=20.0, cpu_seconds=0.5)
REPLIES = [
    reply(8, 10),  # answered at the moment it opened
    reply(9, 12),
    reply(13, 14),
    reply(14, 15, "429 queue_full"),
    reply(15, 20),
    reply(19, 31),
    reply(20, 21),
]


def test_a_closed_loop_counts_what_is_answered_in_the_window() -> None:
    """Failures are counted apart, and have no latency."""
    point = summarise(Clients(3), REPLIES, WINDOW, None)
    assert (point.clients, point.rate, point.seconds) == (3, None, 10.0)
    assert (point.requests, point.failures, point.failed) == (3, {"429 queue_full": 1}, 1)
    assert (point.requests_per_second, point.inputs_per_second, point.tokens_per_second) == (0.3, 0.6, 0.9)
    assert point.source_tokens_per_second == 2.1
    assert point.latency is not None
    assert (point.latency.p50, point.latency.max, point.latency.mean) == (3.0, 5.0, 3.0)
    assert (point.sent_late, point.arrivals_per_second, point.first_token) == (None, None, None)
    assert (point.generator_cpu_per_request, point.generator_cpu_share) == (0.125, 0.05)


def test_an_open_loop_counts_what_was_due_in_the_window() -> None:
    """Whenever it was answered; its rate is of what was answered in the window, whenever that was due."""
    point = summarise(Rate(0.5), REPLIES, WINDOW, None)
    assert (point.clients, point.rate, point.arrivals_per_second) == (None, 0.5, 0.4)
    assert (point.requests, point.failures) == (3, {"429 queue_full": 1})
    assert point.requests_per_second == 0.3
    assert point.latency is not None
    assert (point.latency.p50, point.latency.max) == (5.0, 12.0)
    assert point.sent_late is not None
    assert point.sent_late.max == 0.5


def test_what_was_not_sent_was_not_sent_late() -> None:
    """But it failed."""
    point = summarise(Rate(1.0), [reply(11, 11, NOT_SENT)], WINDOW, None)
    assert (point.failures, point.sent_late, point.latency) == ({NOT_SENT: 1}, None, None)


def test_first_tokens_are_measured_from_when_a_request_was_due() -> None:
    point = summarise(Clients(1), [Reply(11.0, 11.0, 11.25, 12.0, 1)], WINDOW, None)
    assert point.first_token is not None
    assert point.first_token.p50 == 0.25


def test_a_window_that_never_opened_is_an_empty_point() -> None:
    point = summarise(Clients(1), REPLIES, Window(5.0, 5.0, 0.0), None, interrupted=True)
    assert (point.requests, point.tokens_per_second, point.latency, point.interrupted) == (0, 0.0, None, True)


def run_of(*points: Any) -> Run:
    return Run(
        version="1", command="transduce bench", started="2026-11-23T12:00:00+00:00", url="http://server",
        model={"id": "any"}, settings={"parameters": {"num_beams": 4}}, machine={}, points=list(points),
    )  # fmt: skip


def test_json_holds_everything() -> None:
    """What is read back is what was written."""
    figures = server_figures(*pages())
    run = run_of(summarise(Clients(3), REPLIES, WINDOW, figures), summarise(Rate(0.5), REPLIES, WINDOW, None))
    assert Run.model_validate_json(run.model_dump_json()) == run


def test_a_table_has_a_line_per_point_and_says_what_to_beware_of() -> None:
    """Columns without a figure are left out; a missing one is a dash."""
    none = summarise(Clients(64), [reply(11, 12, "timeout")], Window(10.0, 12.0, 1.5), None, interrupted=True)
    assert table(run_of(summarise(Clients(1), REPLIES, WINDOW, None), none)).splitlines() == [
        "                           requests  inputs  tokens   mean    p50    p95    p99",
        "clients  requests  failed        /s      /s      /s     ms     ms     ms     ms",
        "      1         3       1       0.3     0.6       1  3,000  3,000  5,000  5,000",
        "     64         0       1       0.0       -       0      -      -      -      -",
        "1 client: 1 of 4 requests failed: 1 x 429 queue_full",
        "64 clients: interrupted after 2.0 s",
        "64 clients: 1 of 1 requests failed: 1 x timeout",
        "64 clients: the load itself took 75% of the one core it can use; the server may be faster than this",
        "the load itself took 125.00 to 1500.00 ms of processor time per request, 75% of a core at most",
    ]


def test_a_table_says_that_a_server_falls_behind() -> None:
    """0.3 of 0.4 requests a second; and what its metrics tell stands in columns of their own."""
    text = table(run_of(summarise(Rate(0.5), REPLIES, WINDOW, server_figures(*pages()))))
    assert text.splitlines()[1].endswith("/step  padding     MiB   cores")
    assert "  5.5    25.0%  " in text.splitlines()[2]
    assert "0.5/s: the server fell behind, 0.3 of 0.4 requests/s were answered" in text


@pytest.mark.parametrize("loads", [[Clients(1), Clients(8)], [Rate(0.5), Rate(3.0)], [Clients(5)]])
def test_a_picture_is_1200_pixels_wide(loads: list[Any], tmp_path: Path) -> None:
    """For sweeps of either loop, a single point, and one without an answer."""
    path = tmp_path / "picture.png"
    empty = summarise(loads[-1], [], WINDOW, None)
    draw(run_of(*(summarise(load, REPLIES, WINDOW, None) for load in loads), empty), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, 900)
