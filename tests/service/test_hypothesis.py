"""What may follow a hypothesis, and how good it is: against the definitions, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.hypothesis import MOST_BANS, Constraints, Continuation, Hypothesis, Outlook, largest
from service.patterns import Patterns, Vocabulary
from service.sequence import GenerateParameters
from tests.service.fakes import BOS, EOS, PAD, VOCAB
from tests.service.references import SPECIAL, RandomModel, Slow, log_softmax, requests

IDS = st.integers(3, 12)
"""Few, so that n-grams come again."""


def _said(constraints: Constraints, ids: list[int]) -> Hypothesis:
    hypothesis = constraints.beginning()
    for id in ids:
        hypothesis = constraints.extended(hypothesis, Continuation(id, -1.0, -2.0))
    return hypothesis


def _outlook(logits: np.ndarray, k: int) -> Outlook:
    """One row: the k best candidates and all logits."""
    values = log_softmax(logits)
    values[[PAD, BOS]] = -np.inf
    ids = np.argsort(-values, kind="stable")[:k]
    return Outlook([ids.tolist()], [values[ids].tolist()], logits[None])


@settings(deadline=None)
@given(requests(num_beams=st.integers(1, 2)), st.lists(IDS, max_size=10))
def test_what_is_forbidden_is_what_the_definitions_forbid(slow: Slow, said: list[int]) -> None:
    """Least length, n-grams and suppressed texts together; the prefix and the start token are part of the history."""
    constraints = Constraints(slow.parameters, SPECIAL)
    banned = {id for id in range(VOCAB) if slow.banned(said, id)} - {PAD, BOS}
    assert constraints.forbidden(_said(constraints, said)) - {PAD, BOS} == banned


@settings(deadline=None)
@given(requests(num_beams=st.integers(1, 2)), st.lists(IDS, max_size=10), st.integers(1, VOCAB + 5), st.integers(0, 5))
def test_the_best_are_those_of_all_tokens_sorted(slow: Slow, said: list[int], count: int, more: int) -> None:
    """From as many candidates as it asks for, or from more, or from all logits: penalties, bans and all."""
    constraints = Constraints(slow.parameters, SPECIAL)
    hypothesis = _said(constraints, said)
    banned = constraints.forbidden(hypothesis)
    k, _ = constraints.needs([banned], count)
    best = constraints.best(
        hypothesis, banned, _outlook(slow.model([BOS, *slow.parameters.prefix_ids, *said]), k + more), 0, count
    )
    scores, log_probabilities = slow.scores(said)
    if not constraints.needs_logits(banned):  # only their order counts, so they may be told either way
        scores = np.where(scores > -np.inf, log_probabilities, -np.inf)
    wanted = [id for id in np.argsort(-scores, kind="stable").tolist() if scores[id] > -np.inf][:count]
    assert [by.id for by in best] == wanted
    assert [by.score for by in best] == pytest.approx([scores[id] for id in wanted])
    assert [by.log_probability for by in best] == pytest.approx([log_probabilities[id] for id in wanted])


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, -2.0, -np.inf]), min_size=1, max_size=30), st.integers(1, 40))
def test_of_equals_the_lower_id_comes_first(values: list[float], count: int) -> None:
    """And what is impossible never comes."""
    scores = np.array(values)
    ranked = sorted((id for id in range(len(values)) if values[id] > -np.inf), key=lambda id: (-values[id], id))
    assert largest(scores, count) == ranked[:count]


def test_a_penalty_bends_logits_of_a_single_path_and_log_probabilities_of_beams() -> None:
    """By its sign: what is above 0 is divided, what is below is multiplied. What is reported is the model's own."""
    logits = np.zeros(VOCAB, np.float32)
    logits[[5, 6]] = [4.0, -4.0]
    for beams, bent in ((1, [2.0, -8.0]), (2, (log_softmax(logits)[[5, 6]] * 2).tolist())):
        parameters = GenerateParameters(9, num_beams=beams, repetition_penalty=2.0, prefix_ids=(6,))
        constraints = Constraints(parameters, SPECIAL)
        scores, log_probabilities = constraints.scores(_said(constraints, [5, 5]), frozenset(), logits)
        assert scores[[5, 6]] == pytest.approx(bent)
        assert log_probabilities == pytest.approx(log_softmax(logits))
        assert (scores[[PAD, BOS]] == -np.inf).all()


def test_many_bans_ask_for_all_logits_and_few_for_more_candidates() -> None:
    """Whatever is cheaper for the whole batch; the answer is the same."""
    constraints = Constraints(GenerateParameters(9), SPECIAL)
    few, many = frozenset(range(3, 3 + MOST_BANS)), frozenset(range(3, 4 + MOST_BANS))
    assert constraints.needs([few], 2) == (2 + MOST_BANS, False)
    assert constraints.needs([many], 2) == (1, True)
    assert constraints.needs([frozenset(), few, many], 2) == (2 + MOST_BANS, True)
    outlook = _outlook(RandomModel(1)([BOS]), VOCAB)
    by_logits = constraints.best(constraints.beginning(), many, outlook, 0, 9)
    by_candidates = [(id, value) for id, value in zip(outlook.ids[0], outlook.log_probabilities[0], strict=True)]
    wanted = [(id, value) for id, value in by_candidates if id not in many and value > -np.inf][:9]
    assert [by.id for by in by_logits] == [id for id, _ in wanted]
    assert [by.log_probability for by in by_logits] == pytest.approx([value for _, value in wanted])


def test_a_hypothesis_ends_with_the_end_token_or_a_stop_string_after_the_prefix() -> None:
    """A stop string in the prefix, or one that begins there, is none."""
    stop = Patterns(Vocabulary([b"", b"", b"", b"a", b"b", b"xaby"]), [b"ab"])
    constraints = Constraints(GenerateParameters(9, stop=stop, prefix_ids=(3, 4, 3)), SPECIAL)
    beginning = constraints.beginning()
    assert constraints.ends(beginning, EOS)
    assert not constraints.ends(beginning, 4)
    assert constraints.ends(beginning, 5)
    assert constraints.ends(_said(constraints, [3]), 4)
    assert not constraints.ends(_said(constraints, [4]), 4)


def test_a_suppressed_text_may_begin_in_the_prefix() -> None:
    """It would stand in the whole text."""
    suppress = Patterns(Vocabulary([b"", b"", b"", b"a", b"b", b"xaby"]), [b"ab"])
    constraints = Constraints(GenerateParameters(9, suppress=suppress, prefix_ids=(4, 3)), SPECIAL)
    assert constraints.forbidden(constraints.beginning()) == {4, 5}
    assert constraints.forbidden(_said(constraints, [3, 3])) == {4, 5}
    assert constraints.forbidden(_said(constraints, [EOS, 4])) == {5}
