"""The load generator against a server whose delays are known."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from service.bench.load import measure
from service.bench.report import Point, Reply
from service.bench.target import Target, TargetRefused
from service.bench.workload import Clients, Load, Rate, Workload
from tests.service.fake_target import GENERATED_TOKENS, SOURCE_TOKENS, FakeTarget

TEXTS = ["a", "b", "c"]


def point_of(fake: FakeTarget, load: Load, workload: Workload, stop_after: float | None = None, **asked: Any) -> Point:
    """Measure `fake`; `stop_after` so many seconds somebody presses Ctrl-C."""

    async def run() -> Point:
        stop = asyncio.Event()
        if stop_after is not None:
            asyncio.get_running_loop().call_later(stop_after, stop.set)
        async with fake.listening() as url, Target(url, **asked) as target:
            return await measure(target, load, workload, stop=stop)

    return asyncio.run(run())


def test_a_closed_loop_measures_the_delays_that_there_are() -> None:
    """One request in ten takes 0.6 s and the others 0.15 s; never are more open than there are clients; the requests
    that count are as many as were asked for, and the warm-up, slow here, is not among them."""
    fake = FakeTarget(lambda number: 1.2 if number < 8 else 0.6 if number % 10 == 0 else 0.15)
    point = point_of(fake, Clients(8), Workload(texts=TEXTS, requests=100, warm_up=8))
    assert point.requests == 100
    assert point.failures == {}
    assert fake.most_at_once == 8
    assert point.latency is not None
    assert 0.15 <= point.latency.p50 < 0.27
    assert 0.6 <= point.latency.p95 <= point.latency.max < 0.9
    assert point.latency.mean == pytest.approx(0.195, rel=0.3)
    # Little's law: as many requests are open as there are clients.
    assert point.requests_per_second * point.latency.mean == pytest.approx(8, rel=0.15)
    assert point.tokens_per_second == pytest.approx(point.requests_per_second * GENERATED_TOKENS)
    assert point.source_tokens_per_second == pytest.approx(point.requests_per_second * SOURCE_TOKENS)


def test_a_closed_loop_lasts_for_a_time() -> None:
    """The window is as long as was asked, whatever is open at its end."""
    fake = FakeTarget(lambda number: 0.15)
    point = point_of(fake, Clients(2), Workload(texts=TEXTS, duration=1.5, warm_up=0))
    assert point.seconds == 1.5
    assert point.requests == pytest.approx(2 * 1.5 / 0.15, rel=0.2)


def test_an_open_loop_keeps_its_rate_when_the_server_stalls() -> None:
    """The server answers nothing for 1.2 s, and arrivals go on; who arrived meanwhile waited from when it was due. The
    load is so light that those who waited are answered at once even where other work has the processor, too."""
    began: list[float] = []

    def delay(number: int) -> float:
        began[:] = began or [time.perf_counter()]
        into = time.perf_counter() - began[0]
        return 1.5 - into if 0.3 <= into < 1.5 else 0.001

    fake = FakeTarget(delay)
    point = point_of(fake, Rate(40), Workload(texts=TEXTS, duration=3.6, warm_up=0))
    during = [at for at in fake.arrivals if began[0] + 0.35 <= at < began[0] + 1.45]
    assert len(during) == pytest.approx(44, rel=0.5)
    assert point.failures == {}
    assert point.requests == pytest.approx(144, rel=0.3)
    assert point.latency is not None
    assert point.latency.max == pytest.approx(1.2, abs=0.2)
    assert point.latency.p50 < 0.1
    # A third of the arrivals fall into the stall, and wait 0.6 s on average.
    assert point.latency.mean == pytest.approx(0.6 / 3, rel=0.5)


def test_a_timer_that_is_early_makes_no_request_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event loops round: the request with which the window opens would not count."""
    sleep = asyncio.sleep

    async def early(seconds: float) -> None:
        await sleep(max(0.0, seconds - 0.002))

    monkeypatch.setattr("service.bench.load.asyncio.sleep", early)
    point = point_of(FakeTarget(), Rate(200), Workload(texts=TEXTS, requests=20, warm_up=20))
    assert (point.requests, point.failures) == (20, {})
    assert point.sent_late is not None
    assert point.sent_late.p50 >= 0


def test_an_open_loop_has_no_more_open_than_it_may() -> None:
    """The others fail, unsent: load is bounded, and what was not measured is not kept quiet."""
    fake = FakeTarget(lambda number: 0.5)
    point = point_of(fake, Rate(200), Workload(texts=TEXTS, requests=60, warm_up=0, max_in_flight=10))
    assert fake.most_at_once == 10
    assert point.requests + point.failed == 60
    assert point.failures == {"not sent": 60 - point.requests}
    assert point.failed >= 40


def test_each_kind_of_failure_is_counted_by_its_name() -> None:
    """None of them has a latency."""
    words = ["ok", 429, 500, "malformed", "drop", "ok", 429]
    fake = FakeTarget(lambda number: 0.01 if words[number] == "ok" else 0.5, lambda number: words[number])
    point = point_of(fake, Clients(1), Workload(texts=TEXTS, requests=len(words), warm_up=0))
    assert point.failures == {"429 made_up": 2, "500 made_up": 1, "malformed answer": 1, "connection": 1}
    assert point.requests == 2
    assert point.latency is not None
    assert point.latency.max < 0.4


def test_an_answer_that_does_not_come_is_a_timeout() -> None:
    fake = FakeTarget(lambda number: 5.0 if number == 0 else 0.0)
    point = point_of(fake, Clients(1), Workload(texts=TEXTS, requests=2, warm_up=0), timeout=0.2)
    assert (point.requests, point.failures) == (1, {"timeout": 1})


def test_a_stream_is_measured_at_its_first_event() -> None:
    """Half way here; a comment is no event. Tokens are those of every input's last event."""
    fake = FakeTarget(lambda number: 0.6)
    workload = Workload(texts=TEXTS, requests=6, warm_up=0, inputs_per_request=2)
    point = point_of(fake, Clients(3), workload, stream=True)
    assert fake.bodies[0]["stream"] is True
    assert len(fake.bodies[0]["inputs"]) == 2
    assert (point.requests, point.failures) == (6, {})
    assert point.first_token is not None
    assert point.latency is not None
    assert 0.3 <= point.first_token.p50 < 0.45
    assert 0.6 <= point.latency.p50 < 0.78
    assert point.inputs_per_second == pytest.approx(2 * point.requests_per_second)
    assert point.tokens_per_second == pytest.approx(2 * GENERATED_TOKENS * point.requests_per_second)


def test_a_stream_that_breaks_off_or_ends_in_an_error_is_a_failure() -> None:
    words = ["cut", "fail", "ok"]
    fake = FakeTarget(script=lambda number: words[number] if number < 3 else "ok")
    point = point_of(fake, Clients(1), Workload(texts=TEXTS, requests=3, warm_up=0), stream=True)
    assert (point.requests, point.failures) == (1, {"stream cut off": 1, "stream made_up": 1})


def test_every_point_sends_the_same_texts_in_the_same_order() -> None:
    """To each server too; with the parameters that were given."""
    fakes = [FakeTarget(), FakeTarget()]
    for fake in fakes:
        workload = Workload(texts=[str(n) for n in range(20)], requests=30, warm_up=0, seed=3)
        point_of(fake, Clients(1), workload, parameters={"num_beams": 4}, model="fake")
    assert fakes[0].bodies[:30] == fakes[1].bodies[:30]
    assert fakes[0].bodies[0].keys() == {"inputs", "parameters", "model"}
    assert fakes[0].bodies[0]["parameters"] == {"num_beams": 4}


def test_metrics_are_those_of_the_window() -> None:
    """Read once when it opens and once when it closes; a server without any is measured all the same."""
    page = itertools.count(1)

    def metrics() -> str:
        number = next(page)
        return f"transduce_batch_rows_sum {number * 60}\ntransduce_batch_rows_count {number * 10}\n"

    point = point_of(FakeTarget(metrics=metrics), Clients(2), Workload(texts=TEXTS, requests=10))
    assert next(page) == 3
    assert point.server is not None
    assert (point.server.steps, point.server.rows_per_step) == (10, 6.0)
    assert point_of(FakeTarget(), Clients(2), Workload(texts=TEXTS, requests=10)).server is None


def test_a_point_that_is_stopped_is_what_there_was() -> None:
    """At once, and the server is rid of what was open."""
    fake = FakeTarget(lambda number: 0.05 if number < 20 else 30.0)
    began = time.perf_counter()
    point = point_of(fake, Clients(4), Workload(texts=TEXTS, duration=60), stop_after=1.0)
    assert time.perf_counter() - began < 5
    assert point.interrupted
    assert 0 < point.requests < 20
    assert 0 < point.seconds < 2


def test_replies_are_told_as_they_come() -> None:
    """With whether they are of the time that counts."""
    told: list[tuple[Reply, bool]] = []

    async def run() -> None:
        async with FakeTarget().listening() as url, Target(url) as target:
            workload = Workload(texts=TEXTS, requests=5, warm_up=2)
            await measure(target, Clients(1), workload, on_reply=lambda *reply: told.append(reply))

    asyncio.run(run())
    assert [counted for _, counted in told] == [False, False, True, True, True, True, True]
    assert all(reply.failure is None for reply, _ in told)


def test_what_the_load_costs_is_told() -> None:
    """Processor time per request, and the share of a core that this comes to."""
    point = point_of(FakeTarget(lambda number: 0.02), Clients(8), Workload(texts=TEXTS, requests=400))
    assert point.generator_cpu_per_request is not None
    # The fake server runs in the same process: its part is in this too.
    assert 0 < point.generator_cpu_per_request < 0.01
    cost = point.generator_cpu_per_request * point.requests_per_second
    assert point.generator_cpu_share == pytest.approx(cost, rel=0.05)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (404, "without /v1/generate"),
        (413, "truncate"),
        (503, "readyz"),
        (422, "422 made_up (as the test wants)"),
        ("drop", "cannot reach"),
        ("malformed", "does not answer as POST /v1/generate"),
    ],
)
def test_a_server_that_cannot_be_loaded_is_told_from_its_first_answer(word: str | int, message: str) -> None:
    """In a sentence, with what to do about it."""

    async def run() -> None:
        async with FakeTarget(script=lambda number: word).listening() as url, Target(url) as target:
            await target.check(["a"])

    with pytest.raises(TargetRefused) as refused:
        asyncio.run(run())
    assert message in str(refused.value)


@pytest.mark.parametrize("word", ["cut", "fail"])
def test_a_broken_stream_is_told_from_the_first_answer(word: str) -> None:
    async def run() -> None:
        async with FakeTarget(script=lambda number: word).listening() as url, Target(url, stream=True) as target:
            await target.check(["a"])

    with pytest.raises(TargetRefused, match="does not answer as"):
        asyncio.run(run())


def test_what_a_server_says_of_its_model_is_kept() -> None:
    """Of the one that is asked; nothing of one that it does not list, or where nobody listens."""

    async def run() -> list[Any]:
        async with FakeTarget().listening() as url:
            found = []
            for model in (None, "fake", "other"):
                async with Target(url, model=model) as target:
                    found.append(await target.describe())
        async with Target(url) as target:
            return [*found, await target.describe(), await target.metrics()]

    card = {"id": "fake", "version": "7"}
    assert asyncio.run(run()) == [card, card, None, None, None]
