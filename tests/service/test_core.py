"""An iteration of continuous batching, on a fake model whose answers depend on all of its state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import Core
from service.errors import DeadlineExceeded, EngineFailure, Unavailable
from service.metrics import Metrics
from service.sequence import Failed, Sequence, Stage, Token
from tests.service.fakes import (
    EOS,
    LONGEST_SOURCE,
    LONGEST_TARGET,
    TALKATIVE,
    VOCAB,
    Bench,
    books,
    sample,
    says,
)

LONG = TALKATIVE[0]
SOURCES = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=LONGEST_SOURCE)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(SOURCES, st.integers(1, LONGEST_TARGET), st.integers(0, 6), st.booleans()), max_size=12),
    max_rows=st.integers(1, 5),
    encode_tokens=st.integers(1, 80),
)
def test_a_sequence_gets_the_same_answer_in_any_company(
    calls: list[tuple[list[int], int, int, bool]], max_rows: int, encode_tokens: int
) -> None:
    """Whoever joins and leaves between its steps, whatever moves and grows: ids and log-probabilities are its own."""
    bench = Bench(max_rows=max_rows, encode_tokens=encode_tokens)
    sequences = []
    for source, limit, pause, stream in calls:
        sequences.append(bench.client.generate(source, limit, stream=stream))
        bench.submit(sequences[-1], bench.client.encode(source))
        bench.run(pause)
    bench.run()
    for sequence, (source, limit, _, stream) in zip(sequences, calls, strict=True):
        finished = bench.client.result(sequence)
        assert finished.ids == says(source, limit)
        assert finished.reason == ("stop" if finished.ids[-1] == EOS else "length")
        tokens = [event.id for event in bench.client.events[sequence] if isinstance(event, Token)]
        assert tokens == (finished.ids if stream else [])
    for sequence in bench.client.events:
        if sequence.kind == "encode":
            assert bench.client.vectors(sequence)[:, 0].tolist() == sequence.source_ids
    assert bench.core.state.target_capacity == bench.core.state.source_capacity == 32, "memory is given back"
    assert books(bench.metrics) == {"finished": 2 * len(calls), "running": 0, "waiting": 0}


def test_rows_join_and_leave_between_steps(bench: Bench) -> None:
    """Nobody waits for a batch to fill up or to end: a row that becomes free is taken in the next iteration."""
    long = bench.client.generate(LONG, 8)
    assert says(LONG, 8)[-1] != EOS
    bench.submit(long)
    bench.run(2)
    short = [bench.client.generate([9], 1) for _ in range(5)]
    bench.submit(*short)
    bench.run()
    assert bench.runner.steps == [1, 1, 4, 3, 1, 1, 1, 1]
    assert sample(bench.metrics, "batch_rows_count") == 8
    assert sample(bench.metrics, "generated_tokens_total") == 13


def test_newcomers_are_encoded_in_groups_of_similar_lengths(bench: Bench) -> None:
    """A text is padded to the longest of those within twice its length, not to all that come with it."""
    bench.submit(*(bench.client.generate([5] * length, 1) for length in (3, 8, 9, 30)))
    bench.run(1)
    assert bench.runner.encoded == [("generate", 3, 16), ("generate", 1, 32)]
    assert sample(bench.metrics, "source_tokens_total") == 50
    assert sample(bench.metrics, "padding_tokens_total") == 80 - 50
    assert sample(bench.metrics, "batch_padding_ratio_count") == 2


def test_encodings_are_vectors_without_padding(bench: Bench) -> None:
    """One vector for each token; the array does not hold on to its neighbours' memory."""
    sequences = [bench.client.encode([7] * length) for length in (2, 5)]
    bench.submit(*sequences)
    bench.run(1)
    assert [bench.client.vectors(sequence).shape for sequence in sequences] == [(2, 3), (5, 3)]
    assert all(bench.client.vectors(sequence).base is None for sequence in sequences)
    assert bench.core.idle
    assert bench.runner.steps == []


# ---- cancellation ----


def _cancel_waiting(bench: Bench, sequence: Sequence) -> None:
    bench.submit(sequence)


def _cancel_running(bench: Bench, sequence: Sequence) -> None:
    bench.submit(sequence)
    bench.run(3)
    assert sequence.stage is Stage.RUNNING


@pytest.mark.parametrize("until", [_cancel_waiting, _cancel_running])
def test_a_cancelled_sequence_is_gone_at_once(bench: Bench, until: Callable[[Bench, Sequence], None]) -> None:
    """Its row is free before the next step, it is told nothing more, and the others do not notice."""
    other, cancelled = bench.client.generate(LONG, 30, stream=True), bench.client.generate([5, 6, 7], 30, stream=True)
    bench.submit(other)
    until(bench, cancelled)
    told = len(bench.client.events[cancelled])
    bench.core.cancel([cancelled])
    bench.core.check_integrity()
    assert bench.core.batch.rows == bench.core.scheduler.rows_set_aside == (0 if not bench.runner.steps else 1)
    bench.core.cancel([cancelled])
    bench.run()
    assert len(bench.client.events[cancelled]) == told
    assert bench.client.result(other).ids == says(LONG, 30)
    assert sample(bench.metrics, "requests_total", finish_reason="cancelled") == 1
    assert books(bench.metrics) == {"finished": 2, "running": 0, "waiting": 0}


def test_cancelling_who_is_finished_or_unknown_changes_nothing(bench: Bench) -> None:
    """A cancellation may come too late, or for one that never came."""
    sequence = bench.client.generate(LONG, 2)
    bench.submit(sequence)
    bench.run()
    bench.core.cancel([sequence, bench.client.generate([3])])
    assert bench.client.result(sequence).ids == says(LONG, 2)
    assert sample(bench.metrics, "requests_total") == 1


def test_several_rows_are_given_up_at_once(bench: Bench) -> None:
    """From the middle of the batch; the last rows fill the gaps."""
    sequences = [bench.client.generate([place], 9) for place in range(3, 7)]
    bench.submit(*sequences)
    bench.run(2)
    bench.core.cancel(sequences[1:3])
    bench.run()
    for sequence in (sequences[0], sequences[3]):
        assert bench.client.result(sequence).ids == says(sequence.source_ids, 9)
    assert bench.runner.steps[2] <= 2


# ---- time ----


def test_a_timeout_while_generating_gives_what_there_is(bench: Bench) -> None:
    """Reason timeout, with the tokens so far."""
    wanted = says(LONG, 30)
    sequence = bench.client.generate(LONG, 30, deadline=bench.clock.now + 0.045)
    bench.submit(sequence)
    bench.run()
    finished = bench.client.result(sequence)
    assert finished.reason == "timeout"
    assert finished.ids == wanted[:6]
    assert sample(bench.metrics, "requests_total", finish_reason="timeout") == 1


def test_what_is_complete_is_not_called_a_timeout(bench: Bench) -> None:
    """At the same step the end token goes before the limit, and the limit before the time."""
    past = bench.clock.now - 1
    stops = next([source] for source in range(3, VOCAB) if len(says([source], 9)) == 1)
    reasons = []
    for source, limit in ((stops, 1), (LONG, 1), (LONG, 2)):
        sequence = bench.client.generate(source, limit)
        bench.submit(sequence)
        sequence.deadline = past  # too late for the line to notice
        bench.run()
        reasons.append(bench.client.result(sequence).reason)
    assert reasons == ["stop", "length", "timeout"]


def test_a_deadline_in_line_is_an_error(bench: Bench) -> None:
    """Who never got a row is answered 504, and does not hold up those behind."""
    running = [bench.client.generate(LONG, 20) for _ in range(4)]
    late, behind = bench.client.generate([5], deadline=bench.clock.now + 0.02), bench.client.generate([6], 3)
    bench.submit(*running, late, behind)
    bench.run()
    assert isinstance(bench.client.error(late), DeadlineExceeded)
    assert bench.client.result(behind).ids == says([6], 3)
    assert sample(bench.metrics, "requests_total", finish_reason="timeout") == 1


def test_timings_are_seconds_since_submission(bench: Bench) -> None:
    """Queue, first token and total, in this order, and observed as such."""
    running = [bench.client.generate(LONG, 5) for _ in range(4)]
    waits = bench.client.generate([5, 6], 3)
    bench.submit(*running, waits)
    bench.run()
    timings = bench.client.finished(waits).timings
    assert timings.queued == pytest.approx(0.05)
    assert timings.first_token == pytest.approx(0.05)
    assert timings.total == pytest.approx(0.07)
    assert sample(bench.metrics, "request_queue_time_seconds_count") == 5
    assert sample(bench.metrics, "time_to_first_token_seconds_count") == 5
    assert sample(bench.metrics, "e2e_request_latency_seconds_sum") == pytest.approx(4 * 0.04 + 0.07)
    assert sample(bench.metrics, "inter_token_latency_seconds_count") == 4 * 4 + 2
    assert sample(bench.metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.01 * 18)


# ---- failure ----


def test_a_failing_encoder_harms_only_the_newcomers_of_that_call(bench: Bench) -> None:
    """Those who run go on, and later ones are served."""
    running, newcomer, later = (
        bench.client.generate(LONG, 9),
        bench.client.generate([5]),
        bench.client.generate([6], 4),
    )
    bench.submit(running)
    bench.run(2)
    bench.runner.fail = {"encode_into"}
    bench.submit(newcomer)
    bench.run(1)
    bench.runner.fail = set()
    bench.submit(later)
    bench.run()
    assert isinstance(bench.client.error(newcomer), EngineFailure)
    assert bench.client.result(running).ids == says(LONG, 9)
    assert bench.client.result(later).ids == says([6], 4)
    assert sample(bench.metrics, "requests_total", finish_reason="error") == 1


def test_a_failing_step_harms_only_those_who_were_in_it(bench: Bench) -> None:
    """All rows share a step, so all of them fail; who waits is served afterwards, on fresh buffers."""
    running, waiting = [bench.client.generate(LONG, 9) for _ in range(4)], bench.client.generate([5, 6], 9)
    bench.submit(*running, waiting)
    bench.run(2)
    bench.runner.fail = {"step"}
    bench.run(1)
    bench.runner.fail = set()
    bench.run()
    assert all(isinstance(bench.client.error(sequence), EngineFailure) for sequence in running)
    assert bench.client.result(waiting).ids == says([5, 6], 9)
    assert books(bench.metrics) == {"finished": 5, "running": 0, "waiting": 0}


def test_a_failing_encoding_is_an_error_of_its_own(bench: Bench) -> None:
    """Generation next to it is not concerned."""
    bench.runner.fail = {"encode"}
    encoding, generation = bench.client.encode([3]), bench.client.generate(LONG, 5)
    bench.submit(encoding, generation)
    bench.run()
    assert isinstance(bench.client.error(encoding), EngineFailure)
    assert bench.client.result(generation).ids == says(LONG, 5)


@pytest.mark.parametrize("length", [10, 35])
def test_no_memory_to_grow_fails_the_running_and_nobody_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Half-grown buffers are thrown away; the next ones find sound buffers."""
    runs = bench.client.generate(LONG, 60)
    assert len(says(LONG, 60)) == 60
    bench.submit(runs)
    bench.run(3)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bench.core.state, "_grow", no_memory)
        newcomer = bench.client.generate([5] * length, 2)
        bench.submit(newcomer)
        bench.run(40)
    assert isinstance(bench.client.error(runs), EngineFailure)
    assert isinstance(bench.client.last(newcomer), Failed) == (length > 32)
    later = bench.client.generate(LONG, 60)
    bench.submit(later)
    bench.run()
    assert bench.client.result(later).ids == says(LONG, 60)


def test_a_receiver_that_raises_harms_nobody(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and dropped."""

    def broken(event: object) -> None:
        raise RuntimeError("the receiver is broken")

    sequence, other = bench.client.generate([3], 3, stream=True), bench.client.generate([4], 3)
    sequence.on_event = broken
    bench.submit(sequence, other)
    bench.run()
    assert bench.client.result(other).ids == says([4], 3)
    assert "receiver of events failed" in caplog.text


def test_fail_all_answers_everyone(bench: Bench) -> None:
    """Waiting and running alike, and afterwards the core is as new."""
    sequences = [bench.client.generate(LONG, 9) for _ in range(6)]
    bench.submit(*sequences)
    bench.run(2)
    bench.core.fail_all(Unavailable("over"))
    bench.core.check_integrity()
    assert all(str(bench.client.error(sequence)) == "over" for sequence in sequences)
    assert bench.core.idle
    assert books(bench.metrics) == {"finished": 6, "running": 0, "waiting": 0}


def test_lost_rows_are_reported_with_the_numbers(bench: Bench) -> None:
    """Free and used rows are counted in several places, which have to agree."""
    bench.core.state.rows = 2
    with pytest.raises(RuntimeError, match=r"set aside: \(0, 2, 0\), 0"):
        bench.core.check_integrity()


def test_growth_and_memory_are_counted(bench: Bench) -> None:
    """A copy of the state shows in the metrics, and so do its bytes."""
    before = sample(bench.metrics, "state_bytes")
    bench.submit(bench.client.generate(LONG, 40))
    bench.run(35)
    assert sample(bench.metrics, "state_growths_total") == 1
    assert before < sample(bench.metrics, "state_bytes") <= sample(bench.metrics, "state_bytes_limit")
    bench.run()
    assert sample(bench.metrics, "state_bytes") == before
    assert sample(bench.metrics, "rows_capacity") == 4


def test_each_endpoint_is_counted_under_its_own_label(bench: Bench) -> None:
    """The label is the kind unless the caller names a route of ours."""
    bench.submit(
        bench.client.generate([3], 1), bench.client.encode([3]), bench.client.generate([3], 1, endpoint="chat")
    )
    bench.run()
    for endpoint in ("generate", "encode", "chat"):
        assert sample(bench.metrics, "requests_total", endpoint=endpoint) == 1


def test_newcomers_run_from_their_first_call_on(bench: Bench) -> None:
    """Should it never come back, they are seen."""
    seen: list[float] = []
    bench.runner.before_encoding = lambda: seen.append(sample(bench.metrics, "num_requests_running"))
    bench.submit(*(bench.client.generate([place], 1) for place in (3, 4)))
    bench.run()
    assert seen == [2]
    assert sample(bench.metrics, "num_requests_running") == 0


def test_metrics_are_the_models(bench: Bench) -> None:
    """Every sample of ours but those of connections and answers has the model's name, and none what a client wrote."""
    bench.submit(bench.client.generate([3], 1))
    bench.run()
    metrics: Metrics = bench.metrics
    ours = [s for family in metrics.registry.collect() for s in family.samples if s.name.startswith("transduce_")]
    of_all = ("transduce_connection", "transduce_large_answer")
    assert {s.labels["model_name"] for s in ours if not s.name.startswith(of_all)} == {"fake"}
    allowed = {"model_name", "endpoint", "finish_reason", "type", "status", "phase", "call", "reason", "le"}
    assert all(set(s.labels) <= allowed for s in ours)


def test_a_core_says_what_it_is_made_of(bench: Bench) -> None:
    """`repr` is for tests and for people."""
    core: Core = bench.core
    assert repr(core.batch) == "<Batch 0 rows>"
    assert repr(bench.client.generate([3])) == "<Sequence generate new, 1 source tokens>"
    with pytest.raises(ValueError, match="has parameters"):
        Sequence([3], print)
