"""The slow decoders: greedy is beam 1, batches change nothing, beams are what an exhaustive search finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from model.config import TransformerConfig
from model.search import Ensemble, Hypothesis, beam_search, greedy_search
from model.transformer import Transformer


def a_model(seed: int, d_model: int = 16, max_target_tokens: int = 4) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=6,
        d_model=d_model,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        max_source_tokens=16,
        max_target_tokens=max_target_tokens,
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data *= 1.7  # sharper distributions, so that choices differ between sources
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return a_model(3)


SOURCES = [[3, 2], [4, 5, 3, 2], [5, 2], [3, 3, 3, 4, 5, 2], [4, 2]]


def test_greedy_is_beam_one(model: Transformer) -> None:
    for greedy, (best,) in zip(greedy_search(model, SOURCES), beam_search(model, SOURCES, num_beams=1), strict=True):
        assert greedy.ids == best.ids
        assert greedy.log_probability == pytest.approx(best.log_probability, abs=1e-5)


def test_a_batch_changes_no_answer(model: Transformer) -> None:
    together = greedy_search(model, SOURCES)
    assert [h.ids for h in together] == [greedy_search(model, [source])[0].ids for source in SOURCES]


@torch.no_grad()
@pytest.mark.parametrize("several", [False, True])
def test_a_wide_beam_finds_the_best_of_all_sequences(model: Transformer, several: bool) -> None:
    """Over 4 tokens of 4 possible ones every sequence can be scored; a beam as wide as all of them misses none. Of
    several models it is the best by the mean of their probabilities, whatever their widths, within the lowest limit.
    """
    models = [model, a_model(4, d_model=24, max_target_tokens=5), a_model(5)] if several else [model]
    every = [[*body, 2] for n in range(4) for body in itertools.product([3, 4, 5], repeat=n)] + [
        list(body) for body in itertools.product([3, 4, 5], repeat=4)
    ]
    for source in SOURCES:
        scored = []
        for ids in every:
            inputs = torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[1, *ids[:-1]]])
            mean = sum(one(*inputs).softmax(-1)[0, range(len(ids)), ids] for one in models) / len(models)
            scored.append(Hypothesis(ids, float(mean.log().sum())))
        expected = max(scored, key=lambda h: h.score(1.0))
        together = Ensemble(models) if several else model
        best = beam_search(together, [source], num_beams=len(every), length_penalty=1.0)[0][0]
        assert best.ids == expected.ids
        assert best.score(1.0) == pytest.approx(expected.score(1.0), abs=1e-5)


def test_limits_and_special_tokens(model: Transformer) -> None:
    """No more tokens than asked for, and never padding or a start token."""
    for hypothesis in greedy_search(model, SOURCES, max_new_tokens=2):
        assert 1 <= len(hypothesis.ids) <= 2
    for beams in beam_search(model, SOURCES, num_beams=3):
        assert len(beams) == 3
        assert all({0, 1}.isdisjoint(hypothesis.ids) for hypothesis in beams)
        assert [h.score(1.0) for h in beams] == sorted((h.score(1.0) for h in beams), reverse=True)
