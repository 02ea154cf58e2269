"""Searches of all sorts side by side in one running batch, on the fake model: each as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import DeadlineExceeded, EngineFailure
from service.search import search_for
from service.sequence import Event, Finished, GenerateParameters, Scored, Sequence, Stage, Token
from tests.service.fakes import EOS, LONGEST_TARGET, TALKATIVE, VOCAB, Bench, books, sample, says
from tests.service.references import SPECIAL, Slow, requests

LONG = TALKATIVE[0]
SOURCES = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=12)

SEARCHES = st.one_of(
    requests(min_new_tokens=0, no_repeat_ngram_size=0, repetition_penalty=1.0, stop=None, suppress=None, prefix_ids=()),
    requests(),
    requests(
        num_beams=st.integers(2, 4),
        num_return_sequences=st.integers(1, 2),
        length_penalty=st.sampled_from([0.0, 1.0, 2.0]),
        early_stopping=st.sampled_from([False, True, "never"]),
    ),
    requests(
        do_sample=st.just(True),
        seed=st.integers(0, 99),
        num_return_sequences=st.integers(1, 4),
        top_k=st.sampled_from([0, 3, 50, 200]),
        top_p=st.sampled_from([1.0, 0.8]),
        temperature=st.sampled_from([1.0, 1.8]),
    ),
    requests(
        return_alternatives=st.just(True), num_return_sequences=st.integers(2, 4), num_beams=st.sampled_from([1, 1, 2])
    ),
)


@dataclass
class Asked:
    """One sequence to come, and what becomes of it."""

    kind: str
    source: list[int]
    parameters: GenerateParameters
    pause: int
    """Iterations until the next one comes."""
    fate: str
    after: int
    """Iterations until the deadline, for those whose fate it is; calls until the cancellation."""

    def sequence(self, bench: Bench) -> Sequence:
        """A fresh one, streamed."""
        events: list[Event] = []
        parameters = self.parameters if self.kind == "generate" else None
        target = [*self.source, EOS] if self.kind == "score" else None
        sequence = Sequence(
            self.source,
            events.append,
            kind=self.kind,
            parameters=parameters,
            target_ids=target,
            stream=True,  # type: ignore[arg-type]
        )
        bench.client.events[sequence] = events
        return sequence

    def alone(self) -> list[object]:
        """What it is told when nobody else is there."""
        bench = Bench(max_rows=8)
        sequence = self.sequence(bench)
        bench.submit(sequence)
        bench.run()
        return bench.client.told(sequence)


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    slow: Slow = draw(SEARCHES)
    return Asked(
        draw(st.sampled_from(["generate"] * 6 + ["encode", "score"])),
        draw(SOURCES),
        slow.parameters,
        draw(st.integers(0, 5)),
        draw(st.sampled_from(["stays"] * 4 + ["cancelled", "late"])),
        draw(st.integers(0, 8)),
    )


def _check_late(alone: list[object], told: list[object]) -> None:
    """It ended as alone, or with the best there was (which may have ended), or it never got out of the line."""
    if told == alone:
        return
    last = told[-1]
    if isinstance(last, DeadlineExceeded):
        assert len(told) == 1
        return
    assert told[:-1] == alone[: len(told) - 1]
    assert isinstance(last, list)
    for number, result in enumerate(last):
        ids = [event.id for event in told[:-1] if isinstance(event, Token) and event.result == number]
        assert result.ids[: len(ids)] == ids


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(asked(), min_size=1, max_size=9), max_rows=st.integers(8, 12), encode_tokens=st.integers(1, 80))
def test_every_search_is_as_if_it_were_alone(calls: list[Asked], max_rows: int, encode_tokens: int) -> None:
    """Greedy, beams, sampling with a seed, prefixes, alternatives, stop strings, scores and encodings, some cancelled,
    some out of time: all that each is told is what it is told alone, and the books balance at every iteration."""
    bench = Bench(max_rows=max_rows, encode_tokens=encode_tokens)
    sequences: list[Sequence] = []
    to_cancel: list[tuple[int, Sequence]] = []
    for call in calls:
        sequences.append(call.sequence(bench))
        if call.fate == "late":
            sequences[-1].deadline = bench.clock.now + 0.01 * call.after + 0.001
        if call.fate == "cancelled":
            to_cancel.append((len(sequences) + call.after // 3, sequences[-1]))
        bench.submit(sequences[-1])
        bench.run(call.pause)
        bench.core.cancel([sequence for place, sequence in to_cancel if place <= len(sequences)])
        bench.core.check_integrity()
    bench.core.cancel([sequence for _, sequence in to_cancel])
    bench.run()
    bench.core.iterate()  # as after every command: the gauges are told then
    generated = 0
    for sequence, call in zip(sequences, calls, strict=True):
        alone, told = call.alone(), bench.client.told(sequence)
        if call.fate == "stays":
            assert told == alone
        elif call.fate == "late":
            _check_late(alone, told)
        else:
            assert told == alone[: len(told)]
        last = bench.client.last(sequence)
        if isinstance(last, Finished):
            generated += sum(len(result.ids) for result in last.results)
        elif call.kind == "generate" and search_for(call.parameters, SPECIAL, LONGEST_TARGET) is None:
            generated += sum(isinstance(event, Token) for event in told)
    assert sample(bench.metrics, "generated_tokens_total") == generated
    assert books(bench.metrics) == {"finished": len(calls), "running": 0, "waiting": 0}
    assert sample(bench.metrics, "rows_in_use") == bench.core.state.rows == 0
    assert bench.core.state.target_capacity == bench.core.state.source_capacity == 32, "memory is given back"


@pytest.fixture
def bench() -> Bench:
    return Bench(max_rows=6)


# ---- rows ----


def test_rows_are_set_aside_from_the_beginning_and_taken_when_needed(bench: Bench) -> None:
    """A search begins in one row, but it never has to wait for its others half-way."""
    beams = bench.client.generate(LONG, 5, num_beams=4)
    waits = bench.client.generate(LONG, 5, num_beams=3)
    greedy = bench.client.generate(LONG, 2)
    bench.submit(beams, waits, greedy)
    bench.run(1)
    assert (bench.runner.steps, bench.core.scheduler.rows_set_aside) == ([1], 4)
    assert (bench.core.batch.rows, waits.stage) == (4, Stage.WAITING)
    bench.run()
    assert bench.runner.steps[:5] == [1, 4, 4, 4, 4]
    assert bench.runner.steps[5:7] == [2, 4], "one each, then the three beams and the greedy row"
    assert bench.core.scheduler.rows_set_aside == 0


def test_rows_of_texts_that_ended_go_to_nobody_else_but_are_not_stepped(bench: Bench) -> None:
    """Of several sampled texts some end earlier: their rows are empty, and set aside until the last one ends."""
    sampled = bench.client.generate([5], 30, do_sample=True, seed=1, num_return_sequences=6, temperature=3.0)
    bench.submit(sampled)
    bench.run()
    lengths = [len(result.ids) for result in bench.client.finished(sampled).results]
    assert len(set(lengths)) > 2
    assert bench.runner.steps == [1, *(sum(length > step for length in lengths) for step in range(1, max(lengths)))]


def test_cancelling_a_search_frees_all_its_rows_at_once(bench: Bench) -> None:
    """Beams in the middle of others: the batch is dense again, and the others do not notice."""
    greedy = [bench.client.generate(source, 12) for source in TALKATIVE[:2]]
    beams = bench.client.generate(LONG, 12, num_beams=4)
    bench.submit(greedy[0], beams, greedy[1])
    bench.run(4)
    assert bench.core.batch.rows == 6
    bench.core.cancel([beams])
    bench.core.check_integrity()
    assert bench.core.batch.rows == bench.core.scheduler.rows_set_aside == 2
    bench.run()
    assert [bench.client.result(sequence).ids for sequence in greedy] == [says(source, 12) for source in TALKATIVE[:2]]
    assert not any(isinstance(event, Finished) for event in bench.client.events[beams])


def test_a_source_is_not_copied_for_beams(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when a search spreads to new rows does the source's state move; later its beams share what is there."""
    strangers = []
    rearrange = bench.core.state.rearrange

    def spy(*args: Any, **how: Any) -> None:
        strangers.append(len(how["strangers"]))
        rearrange(*args, **how)

    monkeypatch.setattr(bench.core.state, "rearrange", spy)
    bench.submit(bench.client.generate(LONG, 12, num_beams=5))
    bench.run()
    assert strangers[0] == 4
    assert len(strangers) > 3
    assert set(strangers[1:]) == {0}


# ---- failure ----


@pytest.mark.parametrize("part", ["advance", "certain", "results"])
def test_a_search_that_raises_fails_only_its_sequence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows are free in the same iteration; those beside it go on, and the log has the cause."""
    beams = bench.client.generate(LONG, 12, num_beams=3, stream=True)
    others = [bench.client.generate(LONG, 12), bench.client.generate([9], 12, num_beams=2)]
    bench.submit(others[0], beams, others[1])
    bench.run(3)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(beams.search, part, broken)
    if part == "results":
        beams.deadline = bench.clock.now
    bench.run(1)
    assert isinstance(bench.client.error(beams), EngineFailure)
    assert "the search of a sequence failed" in caplog.text
    assert bench.core.batch.rows == 3
    bench.run()
    assert bench.client.result(others[0]).ids == says(LONG, 12)
    assert all(isinstance(bench.client.last(sequence), Finished) for sequence in others)
    assert sample(bench.metrics, "requests_total", finish_reason="error") == 1
    assert books(bench.metrics) == {"finished": 3, "running": 0, "waiting": 0}


def test_a_failing_step_harms_searches_as_others(bench: Bench) -> None:
    """All rows share a step; a sequence of several rows is told once."""
    sequences = [bench.client.generate(LONG, 9, num_beams=3), bench.client.generate(LONG, 9)]
    bench.submit(*sequences)
    bench.run(3)
    bench.runner.fail = {"step"}
    bench.run(1)
    assert all(isinstance(bench.client.error(sequence), EngineFailure) for sequence in sequences)
    assert books(bench.metrics) == {"finished": 2, "running": 0, "waiting": 0}


# ---- time ----


def test_a_beam_search_out_of_time_gives_what_there_is(bench: Bench) -> None:
    """The best hypotheses so far, with reason timeout, the best first."""
    sequence = bench.client.generate(
        LONG, 30, num_beams=3, num_return_sequences=3, min_new_tokens=20, deadline=bench.clock.now + 0.055
    )
    bench.submit(sequence)
    bench.run()
    results = bench.client.finished(sequence).results
    assert [(len(result.ids), result.reason) for result in results] == [(7, "timeout")] * 3
    sums = [sum(result.log_probabilities) for result in results]
    assert sums == sorted(sums, reverse=True)
    assert sample(bench.metrics, "requests_total", finish_reason="timeout") == 1
    assert sample(bench.metrics, "generated_tokens_total") == 21


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2, "seed": 1},
        {"return_alternatives": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_out_of_time_within_the_prefix_there_is_nothing(bench: Bench, asked: dict[str, Any]) -> None:
    """An empty text with reason timeout, and nobody else is harmed."""
    sequence = bench.client.generate(LONG, 9, prefix_ids=(5,) * 8, deadline=bench.clock.now + 0.025, **asked)
    other = bench.client.generate(LONG, 9)
    bench.submit(sequence, other)
    bench.run()
    assert {(tuple(r.ids), r.reason) for r in bench.client.finished(sequence).results} == {((), "timeout")}
    assert bench.client.result(other).ids == says(LONG, 9)


def test_a_search_that_is_complete_is_not_called_a_timeout(bench: Bench) -> None:
    """The last token comes at the deadline itself."""
    sequence = bench.client.generate(LONG, 3, num_beams=2)
    bench.submit(sequence)
    bench.run(2)
    sequence.deadline = bench.clock.now
    bench.run()
    assert bench.client.result(sequence).reason in ("stop", "length")


# ---- alignments and scores ----


def _weights_of_ids(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that tells for which target token and which source token it stands."""

    def score(ids: np.ndarray, lengths: np.ndarray, target_ids: np.ndarray, *, alignment: bool) -> tuple[Any, Any]:
        assert alignment
        return None, 100.0 * target_ids[:, :, None] + ids[:, None, :].astype(np.float32)

    monkeypatch.setattr(bench.runner, "score", score)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 3},
        {"prefix_ids": (8, 9)},
        {"prefix_ids": (8,), "return_alternatives": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_an_alignment_has_a_row_for_each_new_token(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """(generated tokens, source tokens): without the prefix, without padding, and memory of its own."""
    _weights_of_ids(bench, monkeypatch)
    sequence = bench.client.generate([11, 12, 13], 9, return_alignments=True, **asked)
    bench.submit(sequence)
    bench.run()
    for result in bench.client.finished(sequence).results:
        assert result.alignment is not None
        wanted = [[100.0 * id + source for source in (11, 12, 13)] for id in result.ids]
        assert result.alignment.tolist() == wanted
        assert result.alignment.base is None


def test_an_empty_result_has_an_empty_alignment(bench: Bench) -> None:
    """No rows, but as wide as the source; the scorer is not asked."""
    sequence = bench.client.generate(
        [3, 4], 9, return_alignments=True, prefix_ids=(5,) * 9, deadline=bench.clock.now + 0.015
    )
    bench.submit(sequence)
    bench.run()
    alignment = bench.client.result(sequence).alignment
    assert alignment is not None
    assert (alignment.shape, alignment.dtype) == ((0, 2), np.float32)
    assert not any(kind == "score" for kind, *_ in bench.runner.encoded)


def test_a_failing_alignment_fails_its_own_sequence(bench: Bench) -> None:
    """Not the one beside it that asked for none."""
    bench.runner.fail = {"score"}
    aligned = [bench.client.generate(LONG, 5, return_alignments=True, num_beams=beams) for beams in (1, 2)]
    other = bench.client.generate(LONG, 7)
    bench.submit(*aligned, other)
    bench.run()
    assert all(isinstance(bench.client.error(sequence), EngineFailure) for sequence in aligned)
    assert bench.client.result(other).ids == says(LONG, 7)
    assert books(bench.metrics) == {"finished": 3, "running": 0, "waiting": 0}


def test_scores_are_of_the_target_without_padding(bench: Bench) -> None:
    """One log-probability for each token; grouped by both lengths; no row and no step."""
    sequences = [bench.client.score([3] * length, list(range(4, 4 + targets))) for length, targets in ((2, 3), (5, 9))]
    bench.submit(*sequences)
    bench.run()
    for sequence, targets in zip(sequences, (3, 9), strict=True):
        (event,) = bench.client.events[sequence]
        assert isinstance(event, Scored)
        assert event.log_probabilities == [-float(id) for id in range(4, 4 + targets)]
        assert event.timings.first_token is None
    assert (bench.runner.steps, sample(bench.metrics, "generated_tokens_total")) == ([], 0)
    assert sample(bench.metrics, "requests_total", endpoint="score") == 2


def test_a_failing_score_is_an_error_of_its_own(bench: Bench) -> None:
    """Generation next to it is not concerned."""
    bench.runner.fail = {"score"}
    score, generation = bench.client.score([3], [4, 5]), bench.client.generate(LONG, 5, num_beams=2)
    bench.submit(score, generation)
    bench.run()
    assert isinstance(bench.client.error(score), EngineFailure)
    assert len(bench.client.result(generation).ids) <= 5


# ---- metrics ----


def test_steps_tokens_and_rows_of_searches_are_counted(bench: Bench) -> None:
    """Tokens of the results when the search ends; a step between two tokens once for a sequence, however many rows."""
    beams = bench.client.generate(LONG, 6, num_beams=4, num_return_sequences=2, min_new_tokens=6)
    greedy = bench.client.generate(LONG, 4)
    assert len(says(LONG, 4)) == 4
    bench.submit(beams, greedy)
    bench.run(5)
    assert sample(bench.metrics, "generated_tokens_total") == 4, "of the greedy sequence"
    assert sample(bench.metrics, "rows_in_use") == 4
    bench.run()
    assert sample(bench.metrics, "generated_tokens_total") == 4 + 2 * 6
    assert bench.runner.steps == [2, 5, 5, 5, 4, 4]
    assert sample(bench.metrics, "batch_rows_sum") == sum(bench.runner.steps)
    assert sample(bench.metrics, "inter_token_latency_seconds_count") == 5 + 3
    assert sample(bench.metrics, "time_to_first_token_seconds_count") == 2
    assert sample(bench.metrics, "e2e_request_latency_seconds_count") == 2


def test_company_decides_how_many_candidates_a_step_gives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the most demanding needs, rounded up; all logits only while one of them wants them."""
    asked: list[tuple[int, bool]] = []
    step = bench.runner.step

    def spy(batch: Any, state: Any, k: int, logits: bool) -> Any:
        asked.append((k, logits))
        return step(batch, state, k, logits)

    monkeypatch.setattr(bench.runner, "step", spy)
    bench.submit(bench.client.generate(LONG, 4))
    bench.run(1)
    bench.submit(bench.client.generate(LONG, 2, num_beams=3), bench.client.generate(LONG, 1, repetition_penalty=2.0))
    bench.run()
    assert asked == [(1, False), (8, True), (8, False), (1, False)]
