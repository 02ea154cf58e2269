"""The engine from outside: submitting, refusing, cancelling, draining, failing, from several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.artifact import Artifact
from service.core import Core
from service.engine import Engine
from service.errors import (
    ArtifactError,
    EngineFailure,
    QueueFull,
    StartupError,
    TooLarge,
    Unavailable,
    ValidationFailed,
)
from service.health import TOLERATED
from service.sequence import Failed, Finished, Sequence
from service.settings import Settings
from tests.service.fakes import (
    LONGEST_SOURCE,
    LONGEST_TARGET,
    MANIFEST,
    TALKATIVE,
    VOCAB,
    Client,
    FakeRunner,
    books,
    make_metrics,
    sample,
    says,
)

PATIENCE = 30.0
"""Seconds after which a test gives up waiting; nothing here takes so long."""


class Bench:
    """An engine on the fake model, whose steps can be held up."""

    def __init__(self, *, max_rows: int = 2, max_queue: int = 8) -> None:
        self.runner, self.metrics, self.client = FakeRunner(), make_metrics(), Client()
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.runner.before_step = self._before_step
        self.settings = Settings(max_rows=max_rows, max_queue=max_queue)
        self.core: Core | None = None
        self.engine = Engine(
            Artifact(Path(), MANIFEST), self.settings, self.metrics, open_cores=self._open, clock=time.monotonic
        )

    def _open(self) -> list[Core]:
        self.core = Core(
            self.runner, self.metrics, max_rows=self.settings.max_rows, encode_tokens=64, clock=time.monotonic
        )
        return [self.core]

    def _before_step(self) -> None:
        self.in_step.set()
        assert self.gate.wait(PATIENCE)

    def hold(self) -> None:
        """The next step waits until `gate` is set."""
        self.in_step.clear()
        self.gate.clear()

    def await_end(self, *sequences: Sequence) -> None:
        """Wait for the last event of each."""
        wait_for(lambda: all(isinstance(self.client.last(s), (Finished, Failed)) for s in sequences))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a thread has got somewhere. (Tests may poll; the engine does not.)"""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.engine.start()
    assert bench.engine.wait_ready(PATIENCE)
    yield bench
    bench.gate.set()
    bench.engine.stop()


def busy(bench: Bench) -> list[Sequence]:
    """Fill all rows, and hold the engine in the middle of their step."""
    bench.hold()
    sequences = [bench.client.generate(source, 30) for source in TALKATIVE[: bench.settings.max_rows]]
    bench.engine.submit(sequences)
    assert bench.in_step.wait(PATIENCE)
    return sequences


def test_many_threads_submit_and_each_gets_its_own(bench: Bench) -> None:
    """Submitting is safe from any thread, and nothing is lost or mixed up."""
    sequences = [bench.client.generate([3 + n % 50, 5 + n // 50], 12) for n in range(200)]

    def submit(own: list[Sequence]) -> None:
        for sequence in own:
            while True:
                try:
                    bench.engine.submit([sequence])
                    break
                except QueueFull:
                    time.sleep(0.001)

    threads = [threading.Thread(target=submit, args=(sequences[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.await_end(*sequences)
    for sequence in sequences:
        assert bench.client.result(sequence).ids == says(sequence.source_ids, 12)
    wait_for(lambda: books(bench.metrics) == {"finished": 200, "running": 0, "waiting": 0})


def test_a_full_line_refuses_at_once_and_takes_all_or_none(bench: Bench) -> None:
    """429 before anything is queued; what was accepted is served."""
    running = busy(bench)
    waiting = [bench.client.generate([4], 2) for _ in range(6)]
    bench.engine.submit(waiting)
    refused = [bench.client.generate([5], 2) for _ in range(3)]
    with pytest.raises(QueueFull, match="6 of 8 inputs wait") as caught:
        bench.engine.submit(refused)
    assert caught.value.retry_after == 1
    bench.engine.submit(refused[:2])
    assert bench.engine.line[0] == sample(bench.metrics, "num_requests_waiting") == 8
    bench.gate.set()
    bench.await_end(*running, *waiting, *refused[:2])
    assert bench.client.last(refused[2]) is None
    assert bench.engine.line == (0, 0)


def test_what_can_never_fit_is_too_large_not_busy(bench: Bench) -> None:
    """413: trying again would not help."""
    with pytest.raises(TooLarge, match=r"9 inputs of 9 tokens in one call are more than .* hold \(8 inputs"):
        bench.engine.submit([bench.client.generate([3]) for _ in range(9)])
    with pytest.raises(TooLarge, match=f"{LONGEST_SOURCE + 1} tokens, the model takes {LONGEST_SOURCE}"):
        bench.engine.submit([bench.client.generate([3] * (LONGEST_SOURCE + 1))])


def test_what_would_harm_others_is_refused(bench: Bench) -> None:
    """Ids outside the vocabulary and limits outside the buffers never reach the graphs."""
    for source, limit in (([], 1), ([VOCAB], 1), ([-1], 1), ([3], 0), ([3], LONGEST_TARGET + 1)):
        with pytest.raises(ValidationFailed):
            bench.engine.submit([bench.client.generate([3], 1), bench.client.generate(source, limit)])
    assert bench.engine.line == (0, 0)


def test_cancelling_frees_rows_within_a_step(bench: Bench) -> None:
    """While they run and while they wait; the step that was under way is the last that they take part in."""
    running, waiting = busy(bench), [bench.client.generate([4], 2) for _ in range(3)]
    bench.engine.submit(waiting)
    bench.engine.cancel([running[0], waiting[1]])
    bench.gate.set()
    bench.await_end(running[1], waiting[0], waiting[2])
    assert bench.client.last(running[0]) is None
    assert bench.client.last(waiting[1]) is None
    wait_for(lambda: sample(bench.metrics, "requests_total", finish_reason="cancelled") == 2)
    assert bench.runner.steps[0] == 2


def test_cancelling_while_it_is_being_encoded(bench: Bench) -> None:
    """It is under way and cannot be stopped, so it leaves right after; others of the same call are not concerned."""
    encoding, gate = threading.Event(), threading.Event()

    def hold() -> None:
        encoding.set()
        assert gate.wait(PATIENCE)

    bench.runner.before_encoding = hold
    cancelled, other = (bench.client.generate(source, 30) for source in TALKATIVE[:2])
    bench.engine.submit([cancelled, other])
    assert encoding.wait(PATIENCE)
    bench.engine.cancel([cancelled])
    gate.set()
    bench.await_end(other)
    assert bench.client.last(cancelled) is None
    assert bench.client.result(other).ids == says(other.source_ids, 30)
    assert bench.runner.steps == [2] + [1] * 29


def test_cancelling_before_the_engine_has_seen_it(bench: Bench) -> None:
    """Commands are obeyed in order: it comes, and goes, and takes part in nothing."""
    running = busy(bench)
    cancelled = bench.client.generate([5], 30)
    bench.engine.submit([cancelled])
    bench.engine.cancel([cancelled])
    bench.gate.set()
    bench.await_end(*running)
    assert bench.client.events[cancelled] == []
    assert bench.runner.encoded == [("generate", 2, 8)]


def test_draining_answers_what_was_accepted_and_nothing_else(bench: Bench) -> None:
    """503 for newcomers, results for the others, then the thread ends."""
    running, waiting = busy(bench), [bench.client.generate([4], 3) for _ in range(4)]
    bench.engine.submit(waiting)
    bench.engine.drain(PATIENCE)
    assert bench.engine.status == "draining"
    with pytest.raises(Unavailable, match="shutting down") as caught:
        bench.engine.submit([bench.client.generate([3])])
    assert caught.value.retry_after is not None
    bench.gate.set()
    assert bench.engine.join(PATIENCE)
    assert bench.engine.status == "stopped"
    for sequence in running + waiting:
        assert isinstance(bench.client.last(sequence), Finished)
    assert books(bench.metrics) == {"finished": 6, "running": 0, "waiting": 0}


def test_a_drain_that_takes_too_long_fails_the_rest(bench: Bench) -> None:
    """Nobody is left without an answer."""
    running, waiting = busy(bench), [bench.client.generate([4], 3) for _ in range(4)]
    bench.engine.submit(waiting)
    bench.engine.drain(0)
    bench.gate.set()
    assert bench.engine.join(PATIENCE)
    assert all(isinstance(bench.client.error(sequence), Unavailable) for sequence in running + waiting)
    assert books(bench.metrics) == {"finished": 6, "running": 0, "waiting": 0}
    assert sample(bench.metrics, "requests_total", finish_reason="error") == 6


def test_an_idle_engine_drains_at_once(bench: Bench) -> None:
    """It is woken from its sleep."""
    bench.engine.drain(PATIENCE)
    assert bench.engine.join(PATIENCE / 2)
    with pytest.raises(Unavailable, match="has stopped"):
        bench.engine.submit([bench.client.generate([3])])


def test_a_failing_step_does_not_end_the_engine(bench: Bench) -> None:
    """The concerned get an error, the next are served."""
    bench.runner.fail = {"step"}
    failing = bench.client.generate([3], 3)
    bench.engine.submit([failing])
    bench.await_end(failing)
    bench.runner.fail = set()
    served = bench.client.generate([3], 3)
    bench.engine.submit([served])
    bench.await_end(served)
    assert isinstance(bench.client.error(failing), EngineFailure)
    assert bench.client.result(served).ids == says([3], 3)


def test_an_error_of_our_own_does_not_end_the_engine_either(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an iteration raises: all that it worked on are answered, and the books balance."""
    with monkeypatch.context() as patch:
        patch.setattr("service.decoding.endings", lambda *_, **__: 1 / 0)
        failing = bench.client.generate([3], 3)
        bench.engine.submit([failing])
        bench.await_end(failing)
    served = bench.client.generate([3], 3)
    bench.engine.submit([served])
    bench.await_end(served)
    assert isinstance(bench.client.error(failing), EngineFailure)
    assert bench.client.result(served).ids == says([3], 3)
    wait_for(lambda: books(bench.metrics) == {"finished": 2, "running": 0, "waiting": 0})


def test_a_model_that_fails_at_everything_takes_the_engine_out_of_service(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some failures in a row it is examined; it refuses until an examination finds it sound again."""
    monkeypatch.setattr("service.worker.EXAMINE_SECONDS", 0.05)
    bench.runner.fail = {"step"}
    for count in range(TOLERATED):
        assert bench.engine.status == "ready", count
        failing = bench.client.generate([3], 3)
        bench.engine.submit([failing])
        bench.await_end(failing)
        assert isinstance(bench.client.error(failing), EngineFailure)
    wait_for(lambda: bench.engine.status == "failing")
    assert sample(bench.metrics, "ready") == 0
    with pytest.raises(Unavailable, match="fails at whatever it is given"):
        bench.engine.submit([bench.client.generate([3], 3)])
    time.sleep(0.2)
    assert bench.engine.status == "failing"
    bench.runner.fail = set()
    wait_for(lambda: bench.engine.status == "ready")
    assert sample(bench.metrics, "ready") == 1
    served = bench.client.generate([3], 3)
    bench.engine.submit([served])
    bench.await_end(served)
    assert bench.client.result(served).ids == says([3], 3)


@pytest.mark.parametrize("call", ["encode_into", "encode", "score"])
def test_every_call_of_a_failing_model_is_noticed(bench: Bench, call: str) -> None:
    """A decoder that works does not hide an encoder or a scorer that does not."""
    bench.runner.fail = {call}
    make = {"encode_into": bench.client.generate, "encode": bench.client.encode}.get(
        call, lambda ids: bench.client.score(ids, [2])
    )
    for _ in range(TOLERATED):
        if call != "encode_into":
            served = bench.client.generate([3], 3)
            bench.engine.submit([served])
            bench.await_end(served)
            assert bench.client.result(served).ids == says([3], 3)
        failing = make([3])
        bench.engine.submit([failing])
        bench.await_end(failing)
    wait_for(lambda: bench.engine.status == "failing")


def test_those_in_line_for_a_failing_model_may_try_elsewhere(bench: Bench) -> None:
    """They get 503, not 500: nobody has worked on them."""
    running = busy(bench)
    waiting = [bench.client.generate([3], 3) for _ in range(6)]
    bench.engine.submit(waiting)
    bench.runner.fail = {"step", "encode_into"}
    bench.gate.set()
    bench.await_end(*running, *waiting)
    wait_for(lambda: bench.engine.status == "failing")
    assert all(isinstance(bench.client.error(sequence), EngineFailure) for sequence in running)
    errors = [bench.client.error(sequence) for sequence in waiting]
    assert {type(error) for error in errors} == {EngineFailure, Unavailable}
    assert books(bench.metrics) == {"finished": 8, "running": 0, "waiting": 0}


def test_inputs_on_which_a_sound_model_fails_do_not_take_it_out_of_service(bench: Bench) -> None:
    """However often they come: the examination finds the model sound."""

    def fail_on_poison() -> None:
        assert bench.core is not None
        if any(66 in sequence.source_ids for sequence in bench.core.batch.sequences):
            raise RuntimeError("66 is poison")

    bench.runner.before_step = fail_on_poison
    for _ in range(4 * TOLERATED):
        failing = bench.client.generate([66], 3)
        bench.engine.submit([failing])
        bench.await_end(failing)
        assert isinstance(bench.client.error(failing), EngineFailure)
        assert bench.engine.status == "ready"
    served = bench.client.generate([3], 3)
    bench.engine.submit([served])
    bench.await_end(served)
    assert bench.client.result(served).ids == says([3], 3)


def test_lost_rows_take_the_engine_out_of_service_for_good(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its books do not balance: it answers on, says that it had better be replaced, and does not spin."""
    monkeypatch.setattr("service.worker.EXAMINE_SECONDS", 0.05)
    assert bench.core is not None
    bench.core.scheduler.added += 1
    served = bench.client.generate([3], 3)
    bench.engine.submit([served])
    bench.await_end(served)
    wait_for(lambda: bench.engine.status == "failing")
    time.sleep(0.2)
    assert bench.engine.status == "failing"
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
    bench.engine.drain(PATIENCE)
    assert bench.engine.join(PATIENCE)


def test_an_idle_engine_uses_no_processor_time(bench: Bench) -> None:
    """It blocks; it does not poll."""
    served = bench.client.generate([3], 3)
    bench.engine.submit([served])
    bench.await_end(served)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


def test_before_it_is_ready_it_refuses() -> None:
    """503 while the model is being loaded; a drain in that time ends it after loading."""
    bench = Bench()
    with pytest.raises(Unavailable, match="not loaded yet"):
        bench.engine.submit([bench.client.generate([3])])
    assert bench.engine.status == "new"
    assert bench.engine.join(0)
    opened, opening = threading.Event(), bench.engine._open_cores

    def slow() -> Core:
        assert opened.wait(PATIENCE)
        return opening()

    bench.engine._open_cores = slow
    bench.engine.start()
    assert bench.engine.status == "starting"
    assert not bench.engine.wait_ready(0)
    with pytest.raises(Unavailable, match="being loaded"):
        bench.engine.submit([bench.client.generate([3])])
    bench.engine.drain(PATIENCE)
    opened.set()
    assert bench.engine.join(PATIENCE)
    assert bench.engine.status == "stopped"


def test_a_failed_start_is_told_to_who_waits(caplog: pytest.LogCaptureFixture) -> None:
    """The error names the remedy; one that nobody foresaw is wrapped."""
    for raised, told in (
        (ArtifactError("export again"), "export again"),
        (OSError("disk"), "could not be started: disk"),
    ):
        bench = Bench()

        def broken(error: Exception = raised) -> Core:
            raise error

        bench.engine._open_cores = broken
        bench.engine.start()
        with pytest.raises(StartupError, match=told):
            bench.engine.wait_ready(PATIENCE)
        assert bench.engine.status == "failed"
        with pytest.raises(Unavailable, match="could not be loaded"):
            bench.engine.submit([bench.client.generate([3])])
        bench.engine.stop()
    assert "starting failed" in caplog.text
