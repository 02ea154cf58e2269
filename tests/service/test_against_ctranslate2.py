"""Decoding against CTranslate2 with the same weights in float32, above all where `transformers` has nothing to compare
with: alternatives, and scores of given targets.

Where CTranslate2 means something else, the tests ask both for what they share:

- it divides by the length of prefix and text, Transduce by that of the text alone: length_penalty 0 with a prefix;
- beam search ends when num_beams hypotheses have ended (early_stopping), and with length_penalty 0 when the best has;
- the first token of an alternative is never the end token (min_new_tokens 1), behind a prefix only of the best beam;
- forbidden tokens are left out of the sum over the vocabulary: here the end token of the first place, for which the
  tests correct (the model says padding and start, which are left out everywhere, with 1e-7 at most);
- of an alternative's score, the first token's log-probability is a summand beside the normalised rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("ctranslate2")

import ctranslate2

from model.tokenizer import encode_texts
from model.transformer import Transformer
from service.sequence import Result
from tests.benchmarks.ctranslate2_model import Vocabulary, write_ctranslate2_model
from tests.benchmarks.engine_answers import EngineAnswers, ranking
from tests.benchmarks.taught_model import kept
from tests.tiny import sentences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SOURCES = 300
LIMIT = 32
TOLERANCE = 1e-4  # of a token's log-probability


@dataclass
class Peers:
    """One set of weights twice."""

    ours: EngineAnswers
    theirs: ctranslate2.Translator
    vocabulary: Vocabulary
    model: Transformer
    sources: list[list[int]]

    def without_end(self, source: list[int], prefix: list[int]) -> float:
        """The logarithm of what is left of the next token's probabilities without the end token."""
        with torch.no_grad():
            logits = self.model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[1, *prefix]]))
        scores = logits[0, -1].double().log_softmax(-1)
        return float(torch.cat([scores[:2], scores[3:]]).logsumexp(0))  # of 1 - p in floats little is left

    def translate(
        self, prefixes: list[list[int]] | None = None, limit: int = LIMIT, **options: Any
    ) -> list[list[tuple[list[int], float]]]:
        """Their hypotheses with their scores, without the prefix."""
        started = [len(prefix) for prefix in prefixes or [[]] * len(self.sources)]
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(started):
            groups.setdefault(length, []).append(i)
        found: dict[int, list[tuple[list[int], float]]] = {}
        for length, group in groups.items():  # their limit counts the prefix
            results = self.theirs.translate_batch(
                [self.vocabulary.names(self.sources[i][:-1]) for i in group],
                target_prefix=None if prefixes is None else [self.vocabulary.names(prefixes[i]) for i in group],
                max_batch_size=64,
                max_decoding_length=limit + length,
                return_scores=True,
                return_end_token=True,
                disable_unk=True,
                **{"min_decoding_length": 0, **options},
            )
            for i, result in zip(group, results, strict=True):
                ids = [self.vocabulary.ids(hypothesis)[length:] for hypothesis in result.hypotheses]
                found[i] = list(zip(ids, result.scores, strict=True))
        return [found[i] for i in range(len(self.sources))]


@pytest.fixture(scope="module", params=["post-norm", "pre-norm"])
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    cache = request.config.cache
    assert cache is not None
    torch.set_num_threads(1)
    checkpoint, artifact = kept(cache.mkdir("taught-models"), pre_norm=request.param == "pre-norm")
    converted = write_ctranslate2_model(checkpoint, tmp_path_factory.mktemp("ctranslate2") / "model")
    config = checkpoint.recipe.model
    sources = [[*ids, config.eos_id] for ids in encode_texts(checkpoint.tokenizer, sentences(SOURCES, seed=11))]
    translator = ctranslate2.Translator(str(converted), compute_type="float32", intra_threads=1)
    vocabulary = Vocabulary(checkpoint.tokenizer, config.vocab_size)
    return Peers(EngineAnswers(artifact), translator, vocabulary, checkpoint.transformer(), sources)


def prefixes_of(peers: Peers) -> list[list[int]]:
    """One to five tokens that the model would hardly say."""
    return [list(reversed(source[:-1]))[: 1 + i % 5] for i, source in enumerate(peers.sources)]


def total(result: Result) -> float:
    """The sum of log-probabilities."""
    return sum(result.log_probabilities)


def close(ours: float, theirs: float, tokens: int) -> bool:
    """Within the tolerance of so many tokens."""
    return abs(ours - theirs) < TOLERANCE * tokens


def test_greedy(peers: Peers) -> None:
    """The same texts with the same scores."""
    found = peers.ours.results(peers.sources, LIMIT)
    for (ours,), ((ids, score),) in zip(found, peers.translate(beam_size=1, length_penalty=0), strict=True):
        assert ours.ids == ids
        assert close(total(ours), score, len(ids))


@pytest.mark.parametrize("length_penalty", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 4, 5])
def test_beam_search(peers: Peers, num_beams: int, length_penalty: float) -> None:
    """The n best of a search that stops as soon as num_beams hypotheses have ended."""
    found = peers.ours.results(
        peers.sources,
        LIMIT,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping=True,
    )
    theirs = peers.translate(beam_size=num_beams, num_hypotheses=num_beams, length_penalty=length_penalty)
    for ours, others in zip(found, theirs, strict=True):
        assert [result.ids for result in ours] == [ids for ids, _ in others]
        for result, (_, score) in zip(ours, others, strict=True):
            assert abs(ranking(result, length_penalty) - score) < TOLERANCE


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_prefix(peers: Peers, num_beams: int) -> None:
    """The best text after a forced prefix, with its score. The end token may not follow the prefix at once."""
    prefixes = prefixes_of(peers)
    each = [{"prefix_ids": tuple(prefix)} for prefix in prefixes]
    found = peers.ours.results(peers.sources, LIMIT, each, num_beams=num_beams, length_penalty=0.0, min_new_tokens=1)
    # Their least length counts the prefix.
    theirs = [
        peers.translate(prefixes, beam_size=num_beams, length_penalty=0, min_decoding_length=length + 1)
        for length in range(1, 6)
    ]
    for i, (ours,) in enumerate(found):
        ids, score = theirs[len(prefixes[i]) - 1][i][0]
        assert ours.ids == ids
        assert close(total(ours), score + peers.without_end(peers.sources[i], prefixes[i]), len(ids))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prefixed", [False, True])
def test_alternatives(peers: Peers, prefixed: bool, num_beams: int) -> None:
    """The six likeliest next tokens in the order of their probability, each completed by a search of its own, with
    the sum of log-probabilities from the first on."""
    prefixes = prefixes_of(peers) if prefixed else None
    each = None if prefixes is None else [{"prefix_ids": tuple(prefix)} for prefix in prefixes]
    found = peers.ours.results(
        peers.sources,
        LIMIT,
        each,
        num_beams=num_beams,
        num_return_sequences=6,
        return_alternatives=True,
        length_penalty=0.0,
        min_new_tokens=1,
    )
    theirs = peers.translate(
        prefixes, beam_size=num_beams, num_hypotheses=6, return_alternatives=True, length_penalty=0
    )
    for i, (ours, others) in enumerate(zip(found, theirs, strict=True)):
        assert [result.ids for result in ours] == [ids for ids, _ in others]
        assert len({result.ids[0] for result in ours}) == 6
        without_end = peers.without_end(peers.sources[i], [] if prefixes is None else prefixes[i])
        for result, (_, score) in zip(ours, others, strict=True):
            assert close(total(result), score + without_end, len(result.ids))


def test_alternatives_begin_with_the_end_token_if_it_is_likely(peers: Peers) -> None:
    """What CTranslate2 leaves out: without min_new_tokens an alternative may be to end here."""
    greedy = zip(peers.sources[:50], peers.ours.results(peers.sources[:50], LIMIT), strict=True)
    ended = [(source, result.ids) for source, (result,) in greedy if result.reason == "stop" and result.ids[1:]]
    assert len(ended) > 25
    sources, each = [source for source, _ in ended], [{"prefix_ids": tuple(ids[:-1])} for _, ids in ended]
    found = peers.ours.results(sources, LIMIT, each, num_return_sequences=3, return_alternatives=True)
    assert all(results[0].ids == [2] for results in found)


@pytest.mark.parametrize("no_repeat_ngram_size", [2, 3])
def test_no_repeat_ngram_size(peers: Peers, no_repeat_ngram_size: int) -> None:
    """The same texts without repeated n-grams."""
    found = peers.ours.results(peers.sources, LIMIT, no_repeat_ngram_size=no_repeat_ngram_size)
    theirs = peers.translate(beam_size=1, no_repeat_ngram_size=no_repeat_ngram_size)
    assert [ours.ids for (ours,) in found] == [ids for ((ids, _),) in theirs]


def test_repetition_penalty(peers: Peers) -> None:
    """The same greedy texts under a penalty on logits."""
    found = peers.ours.results(peers.sources, LIMIT, repetition_penalty=1.3)
    theirs = peers.translate(beam_size=1, repetition_penalty=1.3)
    assert [ours.ids for (ours,) in found] == [ids for ((ids, _),) in theirs]


def test_least_length(peers: Peers) -> None:
    """No end before min_new_tokens."""
    found = peers.ours.results(peers.sources, LIMIT, min_new_tokens=15)
    theirs = peers.translate(beam_size=1, min_decoding_length=15)
    assert [ours.ids for (ours,) in found] == [ids for ((ids, _),) in theirs]


def test_scores_of_given_targets(peers: Peers) -> None:
    """Every token's log-probability in texts that the model did not choose."""
    targets = [[*reversed(source[:-1])] for source in peers.sources]
    found = peers.ours.scores(peers.sources, [[*target, 2] for target in targets])
    theirs = peers.theirs.score_batch(
        [peers.vocabulary.names(source[:-1]) for source in peers.sources],
        [peers.vocabulary.names(target) for target in targets],
        max_batch_size=64,
    )
    for ours, scored in zip(found, theirs, strict=True):
        assert ours == pytest.approx(scored.log_probs, abs=TOLERANCE)
        assert math.isfinite(sum(ours))
