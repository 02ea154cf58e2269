"""Every control against Hugging Face transformers: the same weights in a Marian model (LayerNorm after each sum) and in
an M2M100 model (before each sublayer), decoded by `generate` in doubles.

Same n-best texts in the same order, and the same scores within 1e-4, on 300 sources for each set of parameters. The
model has learnt a made-up language (see tests/benchmarks/taught_model.py), so its beams compete and its texts end.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.data import pad_rows
from model.tokenizer import encode_texts
from model.transformer import Transformer
from service.patterns import Patterns
from service.sequence import Result
from tests.benchmarks.engine_answers import EngineAnswers, ranking
from tests.benchmarks.taught_model import kept
from tests.benchmarks.transformers_model import Generated, generate, transformers_model
from tests.tiny import sentences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SOURCES = 300
LIMIT = 32
TOLERANCE = 1e-4


@dataclass
class Peers:
    """One set of weights three times."""

    ours: EngineAnswers
    theirs: Any
    model: Transformer
    sources: list[list[int]]

    def compare(
        self,
        count: int = SOURCES,
        limit: int = LIMIT,
        prefixes: Sequence[list[int]] | None = None,
        theirs: dict[str, Any] | None = None,
        **asked: Any,
    ) -> list[list[Result]]:
        """Both answer to the first sources with these parameters, and must answer the same; returns our answers."""
        sources = self.sources[:count]
        each = None if prefixes is None else [{"prefix_ids": tuple(prefix)} for prefix in prefixes]
        found = self.ours.results(sources, limit, each, **asked)
        wanted = generate(self.theirs, sources, prefixes, max_new_tokens=limit, **(asked if theirs is None else theirs))
        scored = asked.get("num_beams", 1) > 1 and asked.get("repetition_penalty", 1.0) == 1.0
        penalty = asked.get("length_penalty", 1.0) if scored else None
        different = [
            (i, describe(ours, penalty), others)
            for i, (ours, others) in enumerate(zip(found, wanted, strict=True))
            if not same(ours, others, penalty)
        ]
        assert not different, f"{len(different)} of {count}: {different[:3]}"
        return found

    def forced(self, source: list[int], prefix: list[int], ids: list[int]) -> list[float]:
        """Log-probabilities of these tokens by their model, in one pass."""
        target = [self.theirs.config.bos_token_id, *prefix, *ids]
        with torch.no_grad():
            logits = self.theirs(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target[:-1]])
            ).logits[0]
        values = logits.log_softmax(-1)[range(len(target) - 1), target[1:]]
        return values[len(prefix) :].tolist()


def same(ours: list[Result], theirs: list[Generated], penalty: float | None) -> bool:
    """Equal ids in equal order, and equal scores where `generate` gives any (`penalty` is the length's)."""
    if [result.ids for result in ours] != [other.ids for other in theirs]:
        return False
    return penalty is None or all(
        other.score is not None and abs(ranking(result, penalty) - other.score) < TOLERANCE * scale(result, penalty)
        for result, other in zip(ours, theirs, strict=True)
    )


def scale(result: Result, penalty: float) -> float:
    """A sum of many tokens may differ by more than a mean."""
    return max(1.0, len(result.ids) ** (1.0 - penalty))


def describe(results: list[Result], penalty: float | None) -> list[Any]:
    """For the message of a failure."""
    return [(result.ids, None if penalty is None else ranking(result, penalty)) for result in results]


@pytest.fixture(scope="module", params=["marian", "m2m100"])
def peers(request: pytest.FixtureRequest) -> Peers:
    cache = request.config.cache
    assert cache is not None
    torch.set_num_threads(1)
    checkpoint, artifact = kept(cache.mkdir("taught-models"), pre_norm=request.param == "m2m100")
    texts = sentences(SOURCES, seed=11)
    sources = [[*ids, checkpoint.recipe.model.eos_id] for ids in encode_texts(checkpoint.tokenizer, texts)]
    # Theirs in doubles: of two continuations 3e-6 apart, floats may take the worse in either engine.
    theirs = transformers_model(checkpoint).double()
    return Peers(EngineAnswers(artifact), theirs, checkpoint.transformer(), sources)


def test_their_model_computes_what_ours_does(peers: Peers) -> None:
    """The converted weights give our logits within 1e-4 at every position, for sources and targets of any length."""
    sources = peers.sources[:64]
    targets = [[1, *reversed(source[:-1])] for source in sources]
    ids, inputs = pad_rows(sources, 0), pad_rows(targets, 0)
    lengths = torch.tensor([len(source) for source in sources])
    mask = (torch.arange(ids.size(1)) < lengths[:, None]).long()
    real = torch.arange(inputs.size(1)) < torch.tensor([len(target) for target in targets])[:, None]
    with torch.no_grad():
        ours = peers.model(ids, lengths, inputs)
        theirs = peers.theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=inputs).logits
    assert (ours - theirs)[real].abs().max() < 1e-4


def test_greedy(peers: Peers) -> None:
    """Without any parameter both take the likeliest token at each step; ours are the probabilities of their model."""
    found = peers.compare()
    assert len({len(results[0].ids) for results in found}) > 10
    for source, (result,) in zip(peers.sources[:50], found, strict=False):
        assert result.log_probabilities == pytest.approx(peers.forced(source, [], result.ids), abs=TOLERANCE)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 4, 5])
def test_beam_search(peers: Peers, num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    """The n best hypotheses with their scores, whatever the number of beams, length penalty and rule of stopping."""
    peers.compare(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )


def test_beams_that_run_into_the_limit(peers: Peers) -> None:
    """At max_new_tokens the hypotheses that have not ended compete with those that have."""
    for limit in (1, 2, 5, 9):
        peers.compare(limit=limit, num_beams=4, num_return_sequences=4, length_penalty=0.6)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("repetition_penalty", [1.3, 0.8])
def test_repetition_penalty(peers: Peers, num_beams: int, repetition_penalty: float) -> None:
    """The same texts. `generate` calls the bent sums scores; ours are the model's own log-probabilities."""
    found = peers.compare(num_beams=num_beams, num_return_sequences=num_beams, repetition_penalty=repetition_penalty)
    for source, results in zip(peers.sources[:20], found, strict=False):
        for result in results:
            assert result.log_probabilities == pytest.approx(peers.forced(source, [], result.ids), abs=TOLERANCE)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("no_repeat_ngram_size", [1, 2, 3])
def test_no_repeat_ngram_size(peers: Peers, num_beams: int, no_repeat_ngram_size: int) -> None:
    """No n-gram occurs twice."""
    plain = peers.ours.results(peers.sources, LIMIT, num_beams=num_beams)
    found = peers.compare(
        num_beams=num_beams, num_return_sequences=num_beams, no_repeat_ngram_size=no_repeat_ngram_size
    )
    assert [results[0].ids for results in plain] != [results[0].ids for results in found]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_min_new_tokens(peers: Peers, num_beams: int) -> None:
    """The end token comes late, or never if it may come only with the last token."""
    for least in (1, 12, 24, LIMIT):
        found = peers.compare(num_beams=num_beams, num_return_sequences=num_beams, min_new_tokens=least)
        assert all(len(result.ids) > least or len(result.ids) == LIMIT for results in found for result in results)


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_prefix(peers: Peers, num_beams: int) -> None:
    """Tokens that are forced (their decoder_input_ids) count neither in the text, nor in its score, nor in
    max_new_tokens; repeated n-grams and repetitions look at them."""
    prefixes = [list(reversed(source[:-1]))[: 1 + i % 5] for i, source in enumerate(peers.sources)]
    several = {"num_beams": num_beams, "num_return_sequences": num_beams}
    for asked in (
        {"length_penalty": 1.0},
        {"length_penalty": 0.0},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 8},
    ):
        peers.compare(limit=20, prefixes=prefixes, **several, **asked)


def test_controls_together(peers: Peers) -> None:
    """Constraints bend each other in the same order."""
    peers.compare(
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.8,
        early_stopping=True,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        min_new_tokens=6,
    )
    peers.compare(repetition_penalty=1.2, no_repeat_ngram_size=2, min_new_tokens=6)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_stop_strings(peers: Peers, num_beams: int) -> None:
    """A hypothesis ends with the token that completes a stop string, however it is split over tokens (their
    `stop_strings`)."""
    texts = ["ke t", "sta", "po m", "ri."]
    stop = Patterns(peers.ours.tokenizer.vocabulary, [text.encode() for text in texts])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=peers.ours.tokenizer._tokenizer)
    several = {"num_beams": num_beams, "num_return_sequences": num_beams}
    found = peers.compare(
        count=100, **several, stop=stop, theirs={**several, "stop_strings": texts, "tokenizer": tokenizer}
    )
    ends = Counter(result.ids[-1] == 2 for results in found for result in results)
    assert min(ends[True], ends[False]) > 10


def test_scores_of_given_targets(peers: Peers) -> None:
    """Every token's log-probability in texts that the model did not choose."""
    targets = [[*reversed(source[:-1]), 2] for source in peers.sources]
    found = peers.ours.scores(peers.sources, targets)
    for source, target, ours in zip(peers.sources, targets, found, strict=True):
        assert ours == pytest.approx(peers.forced(source, [], target), abs=TOLERANCE)


def test_alignments(peers: Peers) -> None:
    """The last layer's attention to the source, mean of the heads, for greedy texts, beams and behind a prefix."""
    sources = peers.sources[:40]
    prefixes = [list(reversed(source[:-1]))[: i % 4] for i, source in enumerate(sources)]
    each = [{"prefix_ids": tuple(prefix)} for prefix in prefixes]
    peers.theirs.set_attn_implementation("eager")
    for beams in (1, 3):
        asked = {"num_beams": beams, "num_return_sequences": beams, "return_alignments": True}
        found = peers.ours.results(sources, LIMIT, each, **asked)
        for source, prefix, results in zip(sources, prefixes, found, strict=True):
            for result in results:
                with torch.no_grad():
                    output = peers.theirs(
                        input_ids=torch.tensor([source]),
                        decoder_input_ids=torch.tensor([[1, *prefix, *result.ids[:-1]]]),
                        output_attentions=True,
                    )
                weights = output.cross_attentions[-1][0].mean(0)[len(prefix) :].float()  # (target, source)
                assert result.alignment is not None
                torch.testing.assert_close(torch.from_numpy(result.alignment), weights, atol=1e-4, rtol=0)


class Suppressed(LogitsProcessor):
    """Forbids what would complete a text, by looking at every token's text."""

    def __init__(self, spelling: list[bytes], text: bytes) -> None:
        self._spelling, self._text = spelling, text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids (rows, target), scores (rows, vocabulary)."""
        for row, ids in enumerate(input_ids.tolist()):
            before = b"".join(self._spelling[id] for id in ids)
            for id, spelling in enumerate(self._spelling):
                if (before + spelling).count(self._text) > before.count(self._text):
                    scores[row, id] = -math.inf
        return scores


@pytest.mark.parametrize("num_beams", [1, 4])
def test_suppressed_texts(peers: Peers, num_beams: int) -> None:
    """A suppressed text does not occur, however it could be split over tokens."""
    vocabulary, text = peers.ours.tokenizer.vocabulary, b"eke"
    several = {"num_beams": num_beams, "num_return_sequences": num_beams}
    processor = LogitsProcessorList([Suppressed(vocabulary.token_bytes, text)])
    found = peers.compare(
        count=60, **several, suppress=Patterns(vocabulary, [text]), theirs={**several, "logits_processor": processor}
    )
    joined = [peers.ours.tokenizer.decode(result.ids) for results in found for result in results]
    assert not any(text.decode() in answer for answer in joined)
    plain = peers.ours.results(peers.sources[:60], LIMIT, **several)
    assert any(text.decode() in peers.ours.tokenizer.decode(result.ids) for results in plain for result in results)


SAMPLING = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 10},
    {"top_k": 3},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    {"top_k": 200, "top_p": 0.95},
]


@pytest.mark.parametrize("asked", SAMPLING, ids=str)
def test_sampling_draws_from_their_distribution(peers: Peers, asked: dict[str, Any]) -> None:
    """The first two tokens of 4,800 texts by 150 seeds: no pair that their warpers exclude, and each as often as it is
    probable (chi-square)."""
    source, seeds, each = max(peers.sources, key=len), 150, 32
    found = peers.ours.results(
        [source] * seeds,
        2,
        [{"seed": seed} for seed in range(seeds)],
        do_sample=True,
        num_return_sequences=each,
        **asked,
    )
    drawn = Counter(tuple(result.ids) for results in found for result in results)
    assert drawn.total() == seeds * each
    first = distribution(peers, source, [], asked)
    exact: dict[tuple[int, ...], float] = {}
    for token in first.nonzero().flatten().tolist():
        if token == 2:
            exact[(token,)] = float(first[token])
            continue
        second = distribution(peers, source, [token], asked)
        for following in second.nonzero().flatten().tolist():
            exact[(token, following)] = float(first[token] * second[following])
    assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-4)
    assert set(drawn) <= set(exact)
    assert chi_square_tail(drawn, exact) > 1e-4


def distribution(peers: Peers, source: list[int], target: list[int], asked: dict[str, Any]) -> torch.Tensor:
    """Their probabilities of the next token, (vocabulary,), after `generate`'s own warpers."""
    with torch.no_grad():
        logits = peers.theirs(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[1, *target]])).logits[
            :, -1
        ]
    logits[:, :2] = -math.inf
    warpers = LogitsProcessorList()
    if "temperature" in asked:
        warpers.append(TemperatureLogitsWarper(asked["temperature"]))
    if "top_k" in asked:
        warpers.append(TopKLogitsWarper(asked["top_k"]))
    if "top_p" in asked:
        warpers.append(TopPLogitsWarper(asked["top_p"]))
    return warpers(torch.tensor([target]), logits)[0].softmax(-1)


def chi_square_tail(drawn: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """How probable a worse fit would be, if the draws were from `exact`; rare outcomes are one."""
    total = drawn.total()
    cells = [(drawn[outcome], total * share) for outcome, share in exact.items() if total * share >= 5]
    cells.append((total - sum(n for n, _ in cells), total - sum(expected for _, expected in cells)))
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells if expected > 1e-6)
    halves = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def test_a_seed_decides_a_text(peers: Peers) -> None:
    """The same seed gives the same texts again and beside others; another seed, and another number of a text, give
    others; log-probabilities are the model's, not the tempered ones."""
    sources = peers.sources[:40]
    seeds = [{"seed": number} for number in range(len(sources))]
    asked = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3}
    first = peers.ours.results(sources, LIMIT, seeds, **asked)
    again = peers.ours.results(sources[::-1], LIMIT, seeds[::-1], **asked)[::-1]
    assert first == again
    other = peers.ours.results(sources, LIMIT, [{"seed": 1000 + number} for number in range(len(sources))], **asked)
    assert sum(a[0].ids == b[0].ids for a, b in zip(first, other, strict=True)) < 5
    assert sum(results[0].ids == results[1].ids for results in first) < 5
    for source, results in itertools.islice(zip(sources, first, strict=True), 20):
        for result in results:
            assert result.log_probabilities == pytest.approx(peers.forced(source, [], result.ids), abs=TOLERANCE)
