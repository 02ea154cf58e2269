"""Beam search against its definition, and what it calls certain on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.beam_search import BeamSearch
from service.hypothesis import Constraints, Outlook
from service.search import search_for
from service.sequence import GenerateParameters
from tests.service.fakes import BOS, EOS, LONGEST_TARGET, PAD
from tests.service.references import SPECIAL, Journey, RandomModel, Slow, Texts, follow, is_told, requests, spellings

BEAMS = {
    "num_beams": st.integers(2, 6),
    "length_penalty": st.sampled_from([0.0, 1.0, 0.6, 2.0, -1.0]),
    "early_stopping": st.sampled_from([False, True, "never"]),
}


def _journey(slow: Slow, **how: int) -> Journey:
    search = search_for(slow.parameters, SPECIAL, LONGEST_TARGET)
    assert search is not None
    return follow(search, slow.model, **how)


@settings(max_examples=150, deadline=None)
@given(requests(**BEAMS), st.integers(0, 6))
def test_beams_find_what_the_definition_finds(slow: Slow, more: int) -> None:
    """Any width, penalty, stopping rule and constraint, with prefix, and with more candidates than were asked for:
    the n best with their own log-probabilities."""
    width = slow.parameters.num_beams
    slow.parameters = replace(slow.parameters, num_return_sequences=width)
    journey, wanted = _journey(slow, more=more), slow.answer()
    assert [result.ids for result in journey.results] == [result.ids for result in wanted]
    assert [result.reason for result in journey.results] == [result.reason for result in wanted]
    for result, other in zip(journey.results, wanted, strict=True):
        assert result.log_probabilities == pytest.approx(other.log_probabilities)
    assert max(journey.rows) <= width


@settings(max_examples=60, deadline=None)
@given(requests(**BEAMS, vocabulary=7, longest=6))
def test_beams_of_a_tiny_vocabulary_run_out_of_words(slow: Slow) -> None:
    """Fewer continuations than beams, or none at all: what there is ends there, and nothing that was said is lost."""
    slow.parameters = replace(slow.parameters, num_return_sequences=slow.parameters.num_beams)
    journey, wanted = _journey(slow), slow.answer()
    assert [(result.ids, result.reason) for result in journey.results] == [
        (result.ids, result.reason) for result in wanted
    ]
    for number in range(len(journey.results)):
        is_told(journey, number)


@settings(max_examples=80, deadline=None)
@given(requests(**BEAMS), st.data())
def test_what_is_certain_is_never_taken_back(slow: Slow, data: st.DataObject) -> None:
    """The tokens told after each step are a beginning of every result, whenever the search is broken off."""
    slow.parameters = replace(
        slow.parameters, num_return_sequences=data.draw(st.integers(1, slow.parameters.num_beams))
    )
    whole = _journey(slow)
    steps = data.draw(st.integers(1, len(whole.rows)))
    for journey in (whole, _journey(slow, steps=steps)):
        for number in range(len(journey.results)):
            is_told(journey, number)
    assert {
        number: told[: len(broken)] for number, broken in journey.told.items() for told in [whole.told[number]]
    } == (journey.told)


@settings(max_examples=60, deadline=None)
@given(requests(**BEAMS, repetition_penalty=1.0))
def test_results_come_sorted_by_score(slow: Slow) -> None:
    """The score is the sum of log-probabilities / their number ** length_penalty; fewer results are the first ones."""
    p = slow.parameters
    results = {}
    for count in (1, p.num_beams):
        slow.parameters = replace(p, num_return_sequences=count)
        results[count] = _journey(slow).results
    scores = [sum(r.log_probabilities) / len(r.ids) ** p.length_penalty for r in results[p.num_beams] if r.ids]
    assert scores == sorted(scores, reverse=True)
    assert results[1] == results[p.num_beams][:1]
    if len(results[p.num_beams]) == p.num_beams and scores:
        rankings = [ranking for ranking, _ in slow.beams()]
        assert scores == pytest.approx(rankings)
    assert len({tuple(result.ids) for result in results[p.num_beams]}) == len(results[p.num_beams])


@settings(max_examples=60, deadline=None)
@given(requests())
def test_one_beam_is_greedy(slow: Slow) -> None:
    """By the same rules: the best token of each step, and no second thoughts. Without a bend that depends on beams."""
    slow.parameters = replace(slow.parameters, repetition_penalty=1.0, prefix_ids=())
    search = BeamSearch(slow.parameters, Constraints(slow.parameters, SPECIAL), slow.limit)
    (beam,) = follow(search, slow.model).results
    assert beam.ids == slow.greedy().ids


def test_much_is_certain_before_the_end() -> None:
    """Streaming with beams is worth it: in 40 random searches more than half of the tokens come early."""
    early, whole = 0, 0
    for seed in range(40):
        parameters = GenerateParameters(30, num_beams=4, min_new_tokens=20)
        search = search_for(parameters, SPECIAL, LONGEST_TARGET)
        assert search is not None
        journey = follow(search, RandomModel(seed, spread=3.0), steps=25)
        early += len(is_told(journey, 0))
        whole += len(journey.results[0].ids)
    assert early > whole / 2


def test_a_search_that_is_broken_off_gives_the_best_so_far() -> None:
    """What ended and what goes on compete by score; what had not ended says timeout."""
    parameters = GenerateParameters(20, num_beams=3, num_return_sequences=3, min_new_tokens=5)
    search = search_for(parameters, SPECIAL, LONGEST_TARGET)
    assert search is not None
    results = follow(search, RandomModel(3), steps=4).results
    assert [(len(result.ids), result.reason) for result in results] == [(4, "timeout")] * 3
    scores = [sum(result.log_probabilities) for result in results]
    assert scores == sorted(scores, reverse=True)


def test_a_search_that_is_broken_off_before_its_first_token_says_timeout() -> None:
    """While the prefix is read there is nothing yet; that is no stop."""
    parameters = GenerateParameters(20, num_beams=3, prefix_ids=(5, 6, 7))
    search = search_for(parameters, SPECIAL, LONGEST_TARGET)
    assert search is not None
    (result,) = follow(search, RandomModel(3), steps=2).results
    assert (result.ids, result.reason) == ([], "timeout")


def test_a_search_to_which_nothing_is_allowed_says_nothing() -> None:
    """It ends at once with an empty text, and its stream too."""
    texts = Texts([b"", b"", b"", b"a", b"ba", b"ca"], suppress=(b"a",))
    parameters = GenerateParameters(9, num_beams=2, min_new_tokens=3, **texts.patterns())  # type: ignore[arg-type]
    journey = _journey(Slow(RandomModel(1, 6), parameters, texts, 9))
    assert [(result.ids, result.reason) for result in journey.results] == [([], "stop")]
    assert journey.told == {}


def test_a_search_in_a_dead_end_keeps_what_it_said() -> None:
    """Each of three words may come once and the end not yet: after the third there is nothing to be said."""
    parameters = GenerateParameters(9, num_beams=2, num_return_sequences=2, min_new_tokens=5, no_repeat_ngram_size=1)
    journey = _journey(Slow(RandomModel(1, 6), parameters, Texts(spellings(6)), 9))
    assert [(sorted(result.ids), result.reason) for result in journey.results] == [([3, 4, 5], "stop")] * 2
    is_told(journey, 0)


def test_an_end_that_is_not_among_the_best_does_not_count() -> None:
    """Of 2 x 2 continuations the first two may end; the third may not, but the others go on in its place."""
    parameters = GenerateParameters(9, num_beams=2)
    search = BeamSearch(parameters, Constraints(parameters, SPECIAL), 9)
    assert (search.k, search.wants_logits) == (4, False)
    assert search.advance(Outlook([[5, 6, EOS, 7]], [[-1.0, -2.0, -2.5, -3.0]], None)) == [0, 0]
    assert search.last_ids == [5, 6]
    assert repr(search) == "<BeamSearch 2 live, 0 ended, best -inf>"
    parents = search.advance(
        Outlook([[EOS, 5, 6, 7], [8, EOS, 9, 10]], [[-0.1, -0.5, -4.0, -5.0], [-0.2, -0.3, -4.0, -5.0]], None)
    )
    assert parents == [0, 1]
    assert search.last_ids == [5, 8]
    assert repr(search) == "<BeamSearch 2 live, 1 ended, best -0.550>"
    assert search.certain() == []


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "goes_on"),
    [(True, 1.0, False), (False, 1.0, True), ("never", 1.0, True), (False, -1.0, True), ("never", -1.0, True)],
)
def test_how_good_a_live_hypothesis_may_become(
    early_stopping: bool | Literal["never"], length_penalty: float, goes_on: bool
) -> None:
    """Two of two have ended, a better one goes on: only `true` stops there. Where a penalty below 0 favours what is
    short, "never" does not hope for a longer text but asks at the present length."""
    asked = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    parameters = GenerateParameters(60, num_beams=2, **asked)  # type: ignore[arg-type]
    search = BeamSearch(parameters, Constraints(parameters, SPECIAL), 60)
    search.advance(Outlook([[5, EOS, 6, 7]], [[-0.1, -5.0, -6.0, -7.0]], None))
    search.advance(
        Outlook([[7, EOS, 8, 9], [7, 8, 9, EOS]], [[-0.1, -3.0, -8.0, -9.0], [-8.0, -9.0, -9.5, -9.9]], None)
    )
    assert search.done != goes_on


def test_tokens_that_are_never_said_do_not_come_even_if_they_are_the_best() -> None:
    """Padding and start have probabilities of their own, which count in the sum."""
    model = RandomModel(2)
    logits = model([BOS]).copy()
    logits[[PAD, BOS]] = 50.0
    parameters = GenerateParameters(1, num_beams=2, num_return_sequences=2, repetition_penalty=1.5)
    search = BeamSearch(parameters, Constraints(parameters, SPECIAL), 1)
    assert search.wants_logits
    search.advance(Outlook([[]], [[]], logits[None]))
    best = np.argsort(-np.where(np.isin(np.arange(len(logits)), (PAD, BOS)), -np.inf, logits))[:2]
    assert [result.ids for result in search.results()] == [[int(id)] for id in best]
    assert all(result.log_probabilities[0] < -30 for result in search.results())
