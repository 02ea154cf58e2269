"""Texts that go on by themselves: greedy under constraints against the definition, and how they are drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import service.single_path
from service.hypothesis import Constraints, Outlook
from service.search import search_for
from service.sequence import GenerateParameters
from service.single_path import MOST_CANDIDATES, Sampler, SinglePaths
from tests.service.fakes import BOS, EOS, LONGEST_TARGET, PAD, VOCAB
from tests.service.references import (
    SPECIAL,
    Journey,
    Logits,
    RandomModel,
    Slow,
    Texts,
    follow,
    is_told,
    requests,
    spellings,
)

MANY = 4000
"""Draws of one test."""


def _search(parameters: GenerateParameters) -> SinglePaths:
    return SinglePaths(parameters, Constraints(parameters, SPECIAL), parameters.max_new_tokens)


def _texts(model: Logits, limit: int = 12, **asked: object) -> list[list[int]]:
    """The sampled results of one request."""
    parameters = GenerateParameters(limit, do_sample=True, **asked)  # type: ignore[arg-type]
    search = search_for(parameters, SPECIAL, LONGEST_TARGET)
    assert search is not None
    return [result.ids for result in follow(search, model).results]


def _first_tokens(model: Logits, draws: int = MANY, **asked: object) -> Counter[int]:
    """How often each token comes first, in many texts."""
    return Counter(ids[0] for ids in _texts(model, 1, num_return_sequences=draws, seed=1, **asked))


def _fits(counts: Counter[int], probabilities: dict[int, float]) -> bool:
    """Chi-square: whether such counts come from these probabilities. A right one is refused once in some 10,000."""
    total = sum(counts.values())
    cells = [id for id, p in probabilities.items() if p * total >= 5]
    rest = 1 - sum(probabilities[id] for id in cells)
    observed = [counts[id] for id in cells]
    pairs = list(zip(observed, [probabilities[id] * total for id in cells], strict=True))
    if rest * total >= 5:
        pairs.append((total - sum(observed), rest * total))
    assert set(counts) <= set(probabilities)
    statistic, freedom = sum((o - e) ** 2 / e for o, e in pairs), len(pairs) - 1
    return bool(statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4)


def _chances(scores: np.ndarray, *, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> dict[int, float]:
    """The definition: the k best, of these the fewest with so much of the probability, all the others never."""
    ranked = sorted(np.flatnonzero(scores > -np.inf).tolist(), key=lambda id: (-scores[id], id))
    ranked = ranked[: top_k or None]
    weights = np.exp((scores[ranked] - scores.max()) / temperature)
    weights /= weights.sum()
    kept: dict[int, float] = {}
    for id, weight in zip(ranked, weights.tolist(), strict=True):
        if kept and top_p < 1 and sum(kept.values()) >= top_p:
            break
        kept[id] = weight
    return {id: weight / sum(kept.values()) for id, weight in kept.items()}


def _allowed(model: Logits) -> np.ndarray:
    """Of each token the first step's logit, -inf for what is never said."""
    logits = model([BOS]).astype(np.float64)
    logits[[PAD, BOS]] = -np.inf
    return logits


def _fixed(**logits: float) -> Logits:
    """A model that says the same at each step: logits by token `t3=`, `t4=`, ..., and -40 for all others."""
    values = np.full(VOCAB, -40.0, np.float32)
    for name, value in logits.items():
        values[int(name[1:])] = value
    return lambda target: values


# ---- greedy ----


@settings(max_examples=150, deadline=None)
@given(requests(), st.integers(0, 6))
def test_greedy_finds_what_the_definition_finds(slow: Slow, more: int) -> None:
    """Under any constraints, with prefix, and with more candidates than were asked for; every token is told at once."""
    search = search_for(slow.parameters, SPECIAL, LONGEST_TARGET)
    wanted = slow.greedy()
    journey = follow(search or _search(slow.parameters), slow.model, more=more)
    (result,) = journey.results
    assert (result.ids, result.reason) == (wanted.ids, wanted.reason)
    assert result.log_probabilities == pytest.approx(wanted.log_probabilities)
    assert len(is_told(journey, 0)) == len(result.ids)
    assert set(journey.rows) == {1}


def test_what_is_plain_needs_no_search_of_its_own() -> None:
    """Greedy without any control; every control that changes what is said makes a search."""
    plain = GenerateParameters(9)
    assert search_for(plain, SPECIAL, 20) is None
    asked: list[dict[str, object]] = [
        {"num_beams": 2},
        {"do_sample": True},
        {"min_new_tokens": 1},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 2},
        {"prefix_ids": (3,)},
        {"return_alternatives": True, "num_return_sequences": 2},
        *({name: patterns} for name, patterns in Texts(spellings(9), (b"a",), (b"b",)).patterns().items()),
    ]
    for one in asked:
        assert search_for(replace(plain, **one), SPECIAL, 20) is not None, one  # type: ignore[arg-type]
    assert search_for(replace(plain, return_alignments=True, length_penalty=2.0), SPECIAL, 20) is None


def test_prefix_and_new_tokens_together_stay_within_the_model() -> None:
    """The limit of new tokens is what the prefix leaves of it."""
    parameters = GenerateParameters(20, prefix_ids=(5,) * 7, min_new_tokens=3)
    search = search_for(parameters, SPECIAL, 10)
    assert search is not None
    (result,) = follow(search, _fixed(t9=0.0)).results
    assert (result.ids, result.reason) == ([9, 9, 9], "length")


def test_a_text_to_which_nothing_is_allowed_ends_there() -> None:
    """With the reason stop, and all that was said so far: greedy, and sampled either way."""
    for asked in ({}, {"do_sample": True, "seed": 1}, {"do_sample": True, "seed": 1, "top_k": 2}):
        parameters = GenerateParameters(9, min_new_tokens=5, no_repeat_ngram_size=1, **asked)  # type: ignore[arg-type]
        search = _search(parameters)
        journey = follow(search, RandomModel(1, 6))
        (result,) = journey.results
        assert (sorted(result.ids), result.reason) == ([3, 4, 5], "stop")
        assert len(is_told(journey, 0)) == 3
        assert repr(search) == "<SinglePaths 0 of 1 going on>"


def test_a_text_that_is_broken_off_says_timeout() -> None:
    """With what there is; texts that had ended keep their reason."""
    parameters = GenerateParameters(12, do_sample=True, num_return_sequences=20, seed=3)
    search = _search(parameters)
    results = follow(search, RandomModel(5), steps=4).results
    assert {(result.reason, result.ids[-1] == EOS) for result in results} == {("timeout", False), ("stop", True)}
    assert {len(result.ids) for result in results if result.reason == "timeout"} == {4}


# ---- seeds ----


def test_a_seed_is_a_text() -> None:
    """The same seed the same text, another seed another text, no seed another text each time."""
    model = RandomModel(7)
    texts = [_texts(model, seed=seed)[0] for seed in range(30)]
    assert texts == [_texts(model, seed=seed)[0] for seed in range(30)]
    assert len(set(map(tuple, texts))) > 20
    assert len({tuple(_texts(model)[0]) for _ in range(10)}) > 5
    assert _texts(model, seed=2**63 - 1) != _texts(model, seed=2**63 - 2)


def test_of_several_texts_the_first_is_the_only_one() -> None:
    """The n-th text of a seed is the same, however many are asked for, and they differ."""
    model = RandomModel(8)
    several = _texts(model, seed=5, num_return_sequences=8)
    for count in (1, 3):
        assert _texts(model, seed=5, num_return_sequences=count) == several[:count]
    assert len(set(map(tuple, several))) > 5


@settings(max_examples=60, deadline=None)
@given(
    requests(
        do_sample=st.just(True),
        seed=st.integers(0, 9),
        num_return_sequences=st.integers(1, 4),
        top_k=st.sampled_from([0, 1, 5, 300]),
        top_p=st.sampled_from([1.0, 0.7]),
        temperature=st.sampled_from([1.0, 0.5, 3.0]),
    ),
    st.integers(1, 6),
)
def test_sampled_texts_depend_on_nothing_else_that_runs(slow: Slow, more: int) -> None:
    """More candidates for others change nothing; constraints hold; all is told at once; rows leave with their texts."""
    journeys: list[Journey] = []
    for extra in (0, more):
        search = search_for(slow.parameters, SPECIAL, LONGEST_TARGET)
        assert search is not None
        journeys.append(follow(search, slow.model, more=extra))
    one, other = journeys
    assert one.results == other.results
    for number, result in enumerate(one.results):
        for place, id in enumerate(result.ids):
            assert not slow.banned(result.ids[:place], id)
        if result.ids and slow.over(result.ids) is not None:
            assert result.reason == slow.over(result.ids)
        wanted = slow.result(result.ids, result.reason).log_probabilities
        assert result.log_probabilities == pytest.approx(wanted), "the model's own, whatever was bent"
        assert len(is_told(one, number)) == len(result.ids)
    begun = len(slow.parameters.prefix_ids) + 1  # steps until the texts part
    assert one.rows[:begun] == [1] * begun
    # One that had nothing to say any more had a row for the step at which that turned out.
    steps = [len(r.ids) if r.ids and slow.over(r.ids) is not None else len(r.ids) + 1 for r in one.results]
    assert one.rows[begun:] == [sum(count > step for count in steps) for step in range(1, max(steps))]


# ---- distributions ----


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 4.0},
        {"top_k": 5},
        {"top_k": 40, "top_p": 0.6},
        {"top_p": 0.8},
        {"top_p": 0.5, "temperature": 2.0},
        {"top_k": 300},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(asked: dict[str, float]) -> None:
    """Of many first tokens: temperature, then top_k, then top_p, and the rest shares what they left."""
    model = RandomModel(11, spread=1.5)
    chances = _chances(_allowed(model), **asked)  # type: ignore[arg-type]
    counts = _first_tokens(model, **asked)
    assert _fits(counts, chances)
    if asked:
        assert not _fits(counts, _chances(_allowed(model), temperature=0.9)), "the test can tell distributions apart"


def test_seeds_one_after_the_other_are_independent() -> None:
    """Users count their seeds upwards: the texts of many seeds are distributed as the texts of one."""
    model = RandomModel(12, spread=1.5)
    counts = Counter(_texts(model, 1, seed=seed)[0][0] for seed in range(1500))
    assert _fits(counts, _chances(_allowed(model)))


def test_one_step_tells_nothing_of_the_next() -> None:
    """Pairs of tokens have the product of their probabilities where the model itself forgets."""
    model = _fixed(t5=0.0, t6=0.5, t7=1.0)
    texts = _texts(model, 2, num_return_sequences=MANY, seed=4, top_k=3)
    chances = _chances(_allowed(model), top_k=3)
    pairs = {10 * a + b: chances[a] * chances[b] for a in chances for b in chances}
    assert _fits(Counter(10 * a + b for a, b in texts), pairs)


def test_what_is_banned_leaves_its_share_to_the_others() -> None:
    """Bans and penalties come before temperature, top_k and top_p."""
    model = RandomModel(11, spread=1.5)
    scores = _allowed(model)
    best = int(scores.argmax())
    texts = Texts([b"x" if id == best else b"" for id in range(VOCAB)], suppress=(b"x",))
    scores[[best, EOS]] = -np.inf
    counts = _first_tokens(model, top_k=10, min_new_tokens=1, **texts.patterns())
    assert set(counts) == set(_chances(scores, top_k=10))
    assert _fits(counts, _chances(scores, top_k=10))
    penal = _allowed(model)
    said = tuple(np.argsort(-penal)[:4].tolist())
    penal[list(said)] = np.where(penal[list(said)] < 0, penal[list(said)] * 3.0, penal[list(said)] / 3.0)
    logits = model([BOS])
    counts = _first_tokens(lambda target: logits, repetition_penalty=3.0, prefix_ids=said, top_p=0.9)
    assert _fits(counts, _chances(penal, top_p=0.9))


def test_supports_are_exact_where_tokens_are_equally_good() -> None:
    """Of equals the lower ids are kept, whether they come as candidates or of all scores."""
    model = _fixed(t3=1.0, t4=1.0, t5=1.0, t6=1.0, t7=0.0)
    for top_k in (1, 2, 3):
        assert set(_first_tokens(model, 200, top_k=top_k)) == set(range(3, 3 + top_k))
    model = _fixed(t3=1.0, t4=1.0, t5=1.0, t6=1.0)
    for top_k in (0, 50):
        for top_p, kept in ((0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (0.999, 4)):
            assert set(_first_tokens(model, 200, top_p=top_p, top_k=top_k)) == set(range(3, 3 + kept)), (top_p, top_k)


def test_the_extremes_are_greedy_and_uniform() -> None:
    """Temperature near 0, one candidate and a tiny top_p take the best token; a high temperature takes any."""
    model = RandomModel(13)
    greedy = Slow(model, GenerateParameters(12), Texts(spellings(VOCAB)), 12).greedy().ids
    for asked in ({"temperature": 0.001}, {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-9, "top_k": 300}):
        assert _texts(model, seed=1, num_return_sequences=3, **asked) == [greedy] * 3
    chances = dict.fromkeys(range(2, VOCAB), 1 / (VOCAB - 2))
    scores = _allowed(model)
    scores[scores > -np.inf] = 0.0
    assert _fits(_first_tokens(lambda target: scores.astype(np.float32), temperature=100.0), chances)


def test_a_top_k_of_many_draws_from_all_scores_what_candidates_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways have one distribution, and the same random number takes the same token."""
    model = RandomModel(14, 400)
    asked = {"top_k": 60, "top_p": 0.95, "temperature": 1.3, "num_return_sequences": 50, "seed": 6}
    by_candidates = _texts(model, **asked)
    monkeypatch.setattr(service.single_path, "MOST_CANDIDATES", 10)
    assert _texts(model, **asked) == by_candidates


def test_it_asks_the_step_for_no_more_than_it_needs() -> None:
    """So many candidates as top_k, or all logits: for top_k 0, for one above the most, and for penalties."""
    for asked, needs in (
        ({"top_k": 5}, (5, False)),
        ({"top_k": MOST_CANDIDATES}, (MOST_CANDIDATES, False)),
        ({"top_k": 0}, (1, True)),
        ({"top_k": MOST_CANDIDATES + 1}, (1, True)),
        ({"top_k": 5, "min_new_tokens": 2}, (6, False)),
        ({"top_k": 5, "repetition_penalty": 2.0}, (1, True)),
    ):
        search = _search(GenerateParameters(9, do_sample=True, seed=1, **asked))  # type: ignore[arg-type]
        assert (search.k, search.wants_logits) == needs, asked


def test_a_draw_never_takes_what_has_no_probability() -> None:
    """Not even with a random number at the very end of its range."""

    class Last:
        def random(self) -> float:
            return 1 - 2**-53

    sampler = Sampler(GenerateParameters(9, do_sample=True, seed=1, temperature=0.001), 1)
    sampler._generators = [Last()]  # type: ignore[list-item]
    assert sampler.draw(0, np.array([0.0, -1.0, -2.0])) == 0
    assert sampler.draw_from_all(0, np.array([-np.inf, 0.0, -9.0, -np.inf])) == 1
    assert sampler.draw_from_all(0, np.array([-np.inf, -np.inf])) is None


def test_several_texts_part_at_the_first_step() -> None:
    """One row until then, and one for each from then on."""
    search = _search(GenerateParameters(9, do_sample=True, seed=1, num_return_sequences=3, top_k=4))
    values = [-1.0, -1.2, -1.4, -1.6]
    assert search.advance(Outlook([[5, 6, 7, 8]], [values], None)) == [0, 0, 0]
    last = search.last_ids
    assert set(last) <= {5, 6, 7, 8}
    assert search.advance(Outlook([[5, 6, 7, 8]] * 3, [values] * 3, None)) == [0, 1, 2]
    assert [ids[:1] for ids in (result.ids for result in search.results())] == [[id] for id in last]
