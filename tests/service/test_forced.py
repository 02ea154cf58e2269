"""Searches whose beginning is given: a prefix, and alternatives to the first token after it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.forced import Alternatives, Prefixed
from service.hypothesis import Outlook
from service.search import Search, search_for
from service.sequence import GenerateParameters
from tests.service.fakes import BOS, EOS, LONGEST_TARGET, PAD
from tests.service.references import (
    SPECIAL,
    RandomModel,
    Slow,
    Texts,
    follow,
    is_told,
    log_softmax,
    requests,
    spellings,
)

ALTERNATIVES = {
    "return_alternatives": st.just(True),
    "num_return_sequences": st.integers(1, 6),
    "num_beams": st.integers(1, 3),
    "length_penalty": st.sampled_from([1.0, 0.0, 2.0]),
    "early_stopping": st.sampled_from([False, True, "never"]),
}
PREFIX = (9, 8, 7)


def _search(parameters: GenerateParameters) -> Search:
    search = search_for(parameters, SPECIAL, LONGEST_TARGET)
    assert search is not None
    return search


@settings(max_examples=100, deadline=None)
@given(requests(**ALTERNATIVES), st.integers(0, 6))
def test_alternatives_are_the_best_first_tokens_each_completed(slow: Slow, more: int) -> None:
    """By the definition: rank the first tokens under all constraints, then search on from each by itself."""
    search = search_for(slow.parameters, SPECIAL, LONGEST_TARGET)
    if search is None:  # one alternative is plain greedy
        return
    journey, wanted = follow(search, slow.model, more=more), slow.answer()
    assert [result.ids for result in journey.results] == [result.ids for result in wanted]
    assert [result.reason for result in journey.results] == [result.reason for result in wanted]
    for number, (result, other) in enumerate(zip(journey.results, wanted, strict=True)):
        assert result.log_probabilities == pytest.approx(other.log_probabilities)
        told = is_told(journey, number)
        assert slow.parameters.num_beams > 1 or len(told) == len(result.ids)
    assert set(journey.told) <= set(range(len(journey.results)))
    assert max(journey.rows) <= slow.parameters.rows


@settings(max_examples=40, deadline=None)
@given(requests(**{**ALTERNATIVES, "num_beams": st.integers(1, 2)}, vocabulary=7, longest=5))
def test_alternatives_of_a_tiny_vocabulary(slow: Slow) -> None:
    """Where fewer first tokens are possible than were asked for there are fewer, numbered without gaps; if none is,
    one empty text."""
    search = search_for(slow.parameters, SPECIAL, LONGEST_TARGET)
    if search is None:
        return
    journey = follow(search, slow.model)
    assert [(r.ids, r.reason) for r in journey.results] == [(r.ids, r.reason) for r in slow.answer()]
    for number in range(len(journey.results)):
        is_told(journey, number)


@settings(max_examples=40, deadline=None)
@given(requests(num_beams=st.integers(1, 3), return_alternatives=st.booleans()), st.integers(1, 12))
def test_a_prefix_is_a_model_that_has_said_it_already(slow: Slow, steps: int) -> None:
    """The search after a prefix is the search without one on a model whose target begins with it: where constraints
    do not look back, results are the same, whenever it is broken off."""
    free = GenerateParameters(
        slow.limit,
        num_beams=slow.parameters.num_beams,
        min_new_tokens=slow.parameters.min_new_tokens,
        num_return_sequences=slow.parameters.num_beams,
        return_alternatives=slow.parameters.return_alternatives,
    )
    search = search_for(free, SPECIAL, LONGEST_TARGET)
    if search is None:
        return
    without = follow(search, lambda target: slow.model([BOS, *PREFIX, *target[1:]]), steps=steps)
    prefixed = follow(_search(replace(free, prefix_ids=PREFIX)), slow.model, steps=steps + len(PREFIX))
    assert prefixed.results == without.results
    assert prefixed.told == without.told
    assert prefixed.rows == [1] * len(PREFIX) + without.rows


def test_while_the_prefix_is_read_nothing_is_asked_and_nothing_told() -> None:
    """Its tokens are fed one by one, whatever the model says of them."""
    search = _search(GenerateParameters(9, num_beams=3, repetition_penalty=2.0, prefix_ids=PREFIX))
    assert isinstance(search, Prefixed)
    for id in PREFIX:
        assert (search.k, search.wants_logits, search.done) == (1, False, False)
        assert search.advance(Outlook([[5]], [[-1.0]], None)) == [0]
        assert search.last_ids == [id]
        assert search.certain() == []
    assert search.wants_logits
    logits = RandomModel(1)([BOS, *PREFIX])
    assert search.advance(Outlook([[5]], [[-1.0]], logits[None])) == [0, 0, 0]
    assert len(search.last_ids) == 3


@pytest.mark.parametrize("asked", [{}, {"num_beams": 2}, {"return_alternatives": True, "num_return_sequences": 3}])
def test_a_search_that_is_broken_off_in_its_prefix_has_an_empty_result(asked: dict[str, int]) -> None:
    """There was no time for a token."""
    search = _search(GenerateParameters(9, prefix_ids=PREFIX, **asked))  # type: ignore[arg-type]
    journey = follow(search, RandomModel(1), steps=2)
    assert [(result.ids, result.reason) for result in journey.results] == [([], "timeout")]


def test_alternatives_that_are_not_begun_have_an_empty_result() -> None:
    """Before the first step and without a prefix too."""
    (result,) = _search(GenerateParameters(9, return_alternatives=True, num_return_sequences=3)).results()
    assert (result.ids, result.reason) == ([], "timeout")


def test_alternatives_to_which_nothing_is_allowed_say_nothing() -> None:
    """One empty text that ended."""
    texts = Texts([b"", b"", b"", b"a", b"ba", b"ca"], suppress=(b"a",))
    asked = {"min_new_tokens": 3, "return_alternatives": True, "num_return_sequences": 2, **texts.patterns()}
    search = _search(GenerateParameters(9, **asked))  # type: ignore[arg-type]
    journey = follow(search, RandomModel(1, 6))
    assert [(result.ids, result.reason) for result in journey.results] == [([], "stop")]
    assert journey.told == {}


def test_an_alternative_may_be_complete_with_its_first_token() -> None:
    """The end token is one like any other, and so is one that completes a stop string, or the limit of one token."""
    model = RandomModel(4)
    texts = Texts(spellings(len(model([BOS]))), stop=(b"a",))
    parameters = GenerateParameters(
        5,
        return_alternatives=True,
        num_return_sequences=95,
        **texts.patterns(),  # type: ignore[arg-type]
    )
    journey = follow(_search(parameters), model)
    at_once = [result for result in journey.results if len(result.ids) == 1]
    assert {result.reason for result in at_once} == {"stop"}
    assert {id for result in at_once for id in result.ids} == {
        id for id, spelling in enumerate(texts.spelling) if b"a" in spelling or id == EOS
    }
    assert all(len(is_told(journey, number)) == len(result.ids) for number, result in enumerate(journey.results))
    single = follow(_search(replace(parameters, max_new_tokens=1, stop=None)), model)
    assert {(len(result.ids), result.reason) for result in single.results} == {(1, "stop"), (1, "length")}
    assert single.rows == [1]


def test_alternatives_come_in_the_order_of_their_first_tokens() -> None:
    """By the model's log-probability of these alone, whatever follows, and each takes as many rows as it has beams."""
    model = RandomModel(5)
    for beams in (1, 2, 3):
        parameters = GenerateParameters(
            6, return_alternatives=True, num_return_sequences=4, num_beams=beams, min_new_tokens=3
        )
        search = _search(parameters)
        assert isinstance(search, Alternatives)
        journey = follow(search, model)
        values = log_softmax(model([BOS]))
        values[[PAD, BOS, EOS]] = -np.inf
        assert [result.ids[0] for result in journey.results] == np.argsort(-values)[:4].tolist()
        assert journey.rows[:3] == [1, 4, 4 * beams]


def test_alternatives_ask_for_what_the_most_demanding_of_them_needs() -> None:
    """One of them may have more banned tokens than another; each is given its own."""
    texts = Texts([b"", b"", b"", b"a", b"b", b"cb", b"c", b"d"], suppress=(b"ab", b"acb"))
    parameters = GenerateParameters(
        9,
        return_alternatives=True,
        num_return_sequences=2,
        **texts.patterns(),  # type: ignore[arg-type]
    )
    search = _search(parameters)
    assert search.k == 2
    assert search.advance(Outlook([[3, 6]], [[-1.0, -2.0]], None)) == [0, 0]
    assert (search.k, search.wants_logits) == (3, False), "two tokens must not follow the first alternative"
    assert search.advance(Outlook([[4, 5, 6], [4, 5, 6]], [[-1.0, -2.0, -3.0]] * 2, None)) == [0, 1]
    assert search.last_ids == [6, 4]
