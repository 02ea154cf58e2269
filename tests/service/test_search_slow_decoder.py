"""Searches in the running batch against the slow, obvious decoder of model/: same weights, same answers and scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import service.decoding
from model.checkpoint import Checkpoint
from model.search import beam_search, greedy_search
from model.tokenizer import encode_texts
from model.transformer import Transformer
from service.artifact import Artifact
from service.beam_search import BeamSearch
from service.core import Core
from service.hypothesis import Constraints, SpecialIds
from service.runner import Runner
from service.sequence import GenerateParameters, Result
from service.settings import Settings
from tests import tiny
from tests.service.fakes import BOS, Client, Clock, make_metrics
from tests.service.references import Slow, Texts, spellings

LIMIT = 20


@dataclass
class Pair:
    """One model, twice."""

    exact: Transformer
    """In doubles: two who round differently, in floats, may be further from each other than from the truth."""
    runner: Runner
    sources: list[list[int]]

    def answers(self, sources: list[list[int]], limit: int = LIMIT, **asked: object) -> list[list[Result]]:
        """What the service says of these, in one batch."""
        core, client = Core(self.runner, make_metrics(), max_rows=24, encode_tokens=500, clock=Clock()), Client()
        sequences = [client.generate(source, limit, **asked) for source in sources]
        core.add(sequences)
        while not core.idle:
            core.iterate()
        return [client.finished(sequence).results for sequence in sequences]

    def logits(self, source: list[int], target: list[int]) -> np.ndarray:
        """(target, vocabulary): what the exact model says after each of these tokens."""
        with torch.no_grad():
            lengths = torch.tensor([len(source)])
            memory = self.exact.encode(torch.tensor([source]), lengths)
            states = self.exact.decoder_states(torch.tensor([target]), memory, lengths)
            return self.exact.output_projection(states)[0].numpy()

    def rounded(self, seed: int) -> Transformer:
        """The exact model with another rounding: each weight of the projection times 1 and some 1e-6."""
        model, generator = copy.deepcopy(self.exact), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = model.output_projection.weight
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        return model

    def forced(self, source: list[int], prefix: tuple[int, ...], ids: list[int]) -> list[float]:
        """The log-probabilities of these tokens by teacher forcing."""
        target = [BOS, *prefix, *ids]
        scores = torch.from_numpy(self.logits(source, target[:-1])).log_softmax(-1)
        return [float(scores[place - 1, target[place]]) for place in range(1 + len(prefix), len(target))]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size are not worth a second thread, which would only wait for a busy processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["pre-norm", "post-norm"])
def pair(request: pytest.FixtureRequest) -> Pair:
    names = {
        "pre-norm": ("tiny_checkpoint", "tiny_fp32_artifact"),
        "post-norm": ("tiny_post_norm_checkpoint", "tiny_post_norm_artifact"),
    }
    checkpoint, artifact = names[request.param]
    loaded: Checkpoint = request.getfixturevalue(checkpoint)
    path: Path = request.getfixturevalue(artifact)
    sources = [[*ids, 2] for ids in encode_texts(loaded.tokenizer, tiny.sentences(100, seed=9))]
    runner = Runner(Artifact.load(path), Settings(threads=1, provider="cpu"))
    return Pair(loaded.transformer().double(), runner, sources)


@pytest.mark.parametrize(("beams", "penalty"), [(4, 1.0), (3, 0.0)])
def test_beams_are_those_of_the_slow_decoder(pair: Pair, beams: int, penalty: float) -> None:
    """100 sources: the same n best in the same order, and the scores of teacher forcing within 1e-4.

    Sums of many tokens (penalty 0) within 1e-5 of their size: that is what PyTorch in floats keeps of doubles, too.
    Where rounding decides which of two is better, or whether to go on, the answer may be another, which the slow
    decoder gives as well if it rounds otherwise: at most once.
    """
    found = pair.answers(pair.sources, num_beams=beams, num_return_sequences=beams, length_penalty=penalty)
    wanted = beam_search(pair.exact, pair.sources, beams, penalty, LIMIT)
    answers = [[result.ids for result in results] for results in found]
    different = [i for i, best in enumerate(wanted) if answers[i] != [hypothesis.ids for hypothesis in best]]
    assert len(different) <= 1
    for i in different:
        rounded = [beam_search(pair.rounded(seed), [pair.sources[i]], beams, penalty, LIMIT)[0] for seed in range(16)]
        assert answers[i] in [[hypothesis.ids for hypothesis in best] for best in rounded]
    for source, results in zip(pair.sources, found, strict=True):
        for result in results:
            exact = sum(pair.forced(source, (), result.ids)) / len(result.ids) ** penalty
            assert sum(result.log_probabilities) / len(result.ids) ** penalty == pytest.approx(
                exact, abs=1e-4, rel=1e-5
            )
    assert len({tuple(result.ids) for results in found for result in results}) > 100


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 2.0},
        {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "prefix_ids": (8, 9), "min_new_tokens": 5},
        {"do_sample": True, "seed": 1, "num_return_sequences": 3, "temperature": 2.0},
        {"do_sample": True, "seed": 1, "top_k": 10},
        {"return_alternatives": True, "num_return_sequences": 5, "prefix_ids": (20,)},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_teacher_forcing(pair: Pair, asked: dict[str, object]) -> None:
    """Within 1e-4 and whatever bent the search: they are the model's own."""
    prefix: tuple[int, ...] = asked.get("prefix_ids", ())  # type: ignore[assignment]
    for source, results in zip(pair.sources, pair.answers(pair.sources[:15], **asked), strict=False):
        for result in results:
            assert result.log_probabilities == pytest.approx(pair.forced(source, prefix, result.ids), abs=1e-4)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3, "num_return_sequences": 3, "early_stopping": "never", "repetition_penalty": 1.3},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "early_stopping": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "prefix_ids": (8, 9)},
        {"return_alternatives": True, "num_return_sequences": 4, "num_beams": 2, "prefix_ids": (7,)},
    ],
    ids=str,
)
def test_constrained_searches_are_those_of_the_definition(pair: Pair, asked: dict[str, object]) -> None:
    """The reference of the pure tests, fed by PyTorch's logits instead of a random model's."""
    limit = 10
    texts = Texts(spellings(300), stop=(b"abca",), suppress=(b"bab", b"cc"))
    sources = pair.sources[:6]
    answers = pair.answers(sources, limit, **asked, **texts.patterns())
    parameters = GenerateParameters(limit, **asked)  # type: ignore[arg-type]
    for source, results in zip(sources, answers, strict=True):
        known: dict[tuple[int, ...], np.ndarray] = {}

        def model(
            target: list[int], source: list[int] = source, known: dict[tuple[int, ...], np.ndarray] = known
        ) -> np.ndarray:
            key = tuple(target)
            if key not in known:
                known[key] = pair.logits(source, target)[-1]
            return known[key]

        wanted = Slow(model, parameters, texts, limit).answer()  # type: ignore[arg-type]
        assert [(r.ids, r.reason) for r in results] == [(r.ids, r.reason) for r in wanted]


def test_one_beam_is_greedy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beam search of width 1, which the service never needs, says what greedy decoding says."""
    sources = pair.sources[:30]
    greedy = greedy_search(pair.exact, sources, LIMIT)

    def one_beam(parameters: GenerateParameters, special: SpecialIds, longest: int) -> BeamSearch:
        return BeamSearch(parameters, Constraints(parameters, special), LIMIT)

    monkeypatch.setattr(service.decoding, "search_for", one_beam)
    found = pair.answers(sources)
    assert [results[0].ids for results in found] == [hypothesis.ids for hypothesis in greedy]


def test_a_hot_sample_is_as_likely_as_its_probabilities_say(pair: Pair) -> None:
    """The mean surprise of sampled first tokens is the entropy of PyTorch's distribution."""
    source = pair.sources[0]
    scores = torch.from_numpy(pair.logits(source, [BOS])[0])
    scores[[0, 1]] = -math.inf
    log_probabilities = scores.log_softmax(-1).numpy()
    probabilities = np.exp(log_probabilities)
    known = probabilities > 0
    entropy = -float((probabilities[known] * log_probabilities[known]).sum())
    deviation = math.sqrt(float((probabilities[known] * (log_probabilities[known] + entropy) ** 2).sum()))
    drawn = [
        result.ids[0]
        for seed in range(40)
        for result in pair.answers([source], 1, do_sample=True, seed=seed, num_return_sequences=24)[0]
    ]
    surprise = -float(np.mean(log_probabilities[drawn]))
    assert abs(surprise - entropy) < 4 * deviation / math.sqrt(len(drawn))
