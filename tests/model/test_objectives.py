"""Losses against their formulas, and runs that learn by each of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from model.checkpoint import Checkpoint
from model.config import ConfigurationError
from model.evaluation import retrieval
from model.objectives import (
    Objective,
    classification_loss,
    contrastive_loss,
    info_nce,
    translation_loss,
)
from model.recipe import Recipe, TrainingConfig
from model.transformer import Transformer
from service.cli import main
from tests import tiny
from tests.model.short_runs import PAIRS, batch, model, train, translations


def test_info_nce_by_hand() -> None:
    """Two pairs at right angles to each other, temperature 0.5: each is found with odds of exp(2) to 1, both ways."""
    vectors = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    none = torch.eye(2, dtype=torch.bool)
    assert float(info_nce(vectors, vectors, none, 0.5)) == pytest.approx(math.log(1 + math.exp(-2)))


def test_equal_texts_are_no_negatives() -> None:
    """Three pairs of which two have the same source: between these only the third pair is a negative."""
    vectors = torch.eye(3)
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    rows = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-1)), math.log(1 + 2 * math.exp(-1))]
    assert float(info_nce(vectors, vectors, same, 1.0)) == pytest.approx(sum(rows) / 3)


def test_the_contrastive_loss_is_that_of_the_vectors_that_encode_gives() -> None:
    """Means over each text's own tokens, of targets as of sources; padding and the batch's order say nothing."""
    net = model().eval()
    config = TrainingConfig(loss="contrastive", contrastive_temperature=0.1)

    def vectors(ids: Tensor) -> Tensor:
        rows = [row[row != 0] for row in ids]
        return torch.stack([net.encode(row[None], torch.tensor([len(row)]))[0].mean(dim=0) for row in rows])

    ours, theirs = vectors(PAIRS.source_ids), vectors(PAIRS.target_outputs)
    expected = info_nce(ours, theirs, torch.eye(3, dtype=torch.bool), 0.1) * PAIRS.target_tokens
    torch.testing.assert_close(contrastive_loss(net, PAIRS, config), expected)
    alone = translation_loss(net, PAIRS, TrainingConfig())
    both = translation_loss(net, PAIRS, TrainingConfig(contrastive_weight=0.5, contrastive_temperature=0.1))
    torch.testing.assert_close(both, alone + 0.5 * expected)


def test_translation_is_the_cross_entropy_of_each_row_alone() -> None:
    """Padding of sources and of targets counts for nothing."""
    net = model().eval()
    config = TrainingConfig(label_smoothing=0.1)
    expected = torch.tensor(0.0)
    for source, target in (([5, 6, 2], [15, 2]), ([7, 2], [16, 17, 18, 2]), ([8, 9, 10, 2], [19, 20, 2])):
        row = batch([source], [target])
        logits = net(row.source_ids, row.source_lengths, row.target_inputs)[0]
        expected = expected + cross_entropy(logits, row.target_outputs[0], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(translation_loss(net, PAIRS, config), expected)


def test_r_drop_of_a_model_that_drops_nothing_changes_nothing() -> None:
    """Both passes are the same then, beside a contrastive loss too; with dropout they differ, and that costs."""
    net = model(dropout=0.3).eval()
    for beside in ({}, {"contrastive_weight": 0.5}):
        plain = translation_loss(net, PAIRS, TrainingConfig(**beside))
        torch.testing.assert_close(translation_loss(net, PAIRS, TrainingConfig(r_drop=5.0, **beside)), plain)
    net.train()
    torch.manual_seed(0)
    passes = translation_loss(net, PAIRS.repeated(2), TrainingConfig()) / 2
    torch.manual_seed(0)
    assert translation_loss(net, PAIRS, TrainingConfig(r_drop=5.0)) > passes
    torch.manual_seed(0)
    torch.testing.assert_close(translation_loss(net, PAIRS, TrainingConfig(r_drop=1e-6)), passes)


def test_classification_is_the_cross_entropy_of_means_over_tokens() -> None:
    """-log softmax of the classifier on the mean of a text's own token vectors, summed over the rows."""
    net = model(labels=("a", "b", "c"), decoder_layers=0).eval()
    labelled = batch([[5, 6, 2], [7, 2]], [[2], [0]])
    assert net.classifier is not None
    expected = torch.tensor(0.0)
    for row, label in (([5, 6, 2], 2), ([7, 2], 0)):
        memory = net.encode(torch.tensor([row]), torch.tensor([len(row)]))[0]
        expected = expected - net.classifier(memory.mean(dim=0)).log_softmax(0)[label]
    torch.testing.assert_close(classification_loss(net, labelled, TrainingConfig(label_smoothing=0.0)), expected)


def test_an_encoder_alone_has_no_weights_of_a_decoder() -> None:
    names = [name for name, _ in model(labels=("a", "b"), decoder_layers=0).named_parameters()]
    assert not [name for name in names if "decoder" in name]
    assert "classifier.weight" in names


@pytest.mark.parametrize(
    ("tables", "name"),
    [
        ({"training": {"loss": "mine"}}, "loss"),
        ({"model": {"dropout": 0.0}, "training": {"r_drop": 5.0}}, "r_drop"),
        ({"training": {"loss": "contrastive", "r_drop": 5.0}}, "r_drop"),
        ({"training": {"loss": "module:"}}, "loss"),
        ({"model": {"decoder_layers": 0}}, "decoder_layers"),
        ({"model": {"decoder_layers": 0, "share_embeddings": False}}, "share_embeddings"),
        ({"model": {"labels": ["one"]}}, "labels"),
        ({"model": {"labels": ["one", 2]}}, "model.labels must be a list of texts"),
        ({"training": {"contrastive_weight": -1.0}}, "contrastive_weight"),
        ({"training": {"contrastive_temperature": 0.0}}, "contrastive_temperature"),
        ({"training": {"distillation_weight": 1.5}}, "distillation_weight"),
        ({"training": {"distillation_top": 8}}, "distillation_top"),
        ({"training": {"distillation_weight": 0.5, "distillation_top": -1}}, "distillation_top"),
        ({"training": {"distillation_weight": 0.5, "distillation_top": 8, "bpe_dropout": 0.1}}, "bpe_dropout"),
        ({"training": {"distillation_weight": 0.5, "distillation_top": 8, "lowercase_share": 0.1}}, "lowercase_share"),
        ({"training": {"distillation_weight": 0.5, "distillation_top": 90}, "model": {"vocab_size": 90}}, "vocab_size"),
        ({"training": {"loss": "classification", "contrastive_weight": 1.0}}, "contrastive_weight"),
        ({"training": {"loss": "classification", "join_share": 0.5}, "model": {"decoder_layers": 0}}, "join_share"),
        ({"training": {"loss": "classification"}}, "decoder_layers"),
        ({"model": {"labels": ["one", "two"]}}, "decoder_layers"),
        ({"training": {"loss": "contrastive"}, "model": {"max_source_tokens": 9}}, "max_target_tokens"),
    ],
)
def test_objectives_that_cannot_work_are_refused_by_the_fields_name(tables: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Recipe.from_dict(tables)


@pytest.mark.parametrize("path", ["no_such_package.module:loss", "model.objectives:no_such_loss", "math:pi"])
def test_a_loss_that_cannot_be_imported_is_refused_with_its_path(path: str) -> None:
    with pytest.raises(ConfigurationError, match=path):
        Objective(model(), TrainingConfig(loss=path))


# ---- runs ----


def labelled() -> list[str]:
    """Whether a sentence speaks of a cat."""
    return [f"{text}\t{'cat' if 'cat' in text.lower() else 'none'}" for text in tiny.sentences(400)]


def test_a_classifier_learns_its_labels_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels are found, most sentences held back are told right, and `evaluate` says so."""
    found = train(tmp_path, "cats", labelled(), loss="classification", steps=80)
    checkpoint = Checkpoint.load(found)
    assert checkpoint.recipe.model.labels == ("cat", "none")
    assert checkpoint.metadata["validation"]["accuracy"] > 90
    assert main(["evaluate", str(found), "--data", str(tmp_path / "cats" / "valid.tsv")]) == 0
    assert capsys.readouterr().out.startswith("accuracy 9") or checkpoint.metadata["validation"]["accuracy"] == 100


def test_contrastive_learning_makes_translations_find_each_other(tmp_path: Path) -> None:
    """Texts written backwards in capitals are found among the held-back ones more often than at first."""
    found = Checkpoint.load(train(tmp_path, "pairs", translations(), loss="contrastive", steps=100))
    untrained = Transformer(found.recipe.model)
    references = {line.split("\t")[0]: [line.split("\t")[1]] for line in translations()[:60]}
    before = retrieval(untrained, found.tokenizer, references)
    assert found.metadata["validation"]["retrieval"] > 2 * before
    assert retrieval(found.transformer(), found.tokenizer, references) > 2 * before


def test_a_run_begins_with_another_models_weights_and_learns_from_a_teacher(tmp_path: Path) -> None:
    """The tokenizer comes along; a classifier takes a translator's encoder."""
    first = train(tmp_path, "first", translations(), decoder_layers=1, steps=2)
    options = ("--init", str(first), "--teacher", str(first), str(first))
    second = train(tmp_path, "second", translations(), *options, decoder_layers=1, steps=1, distillation_weight=0.5)
    start, end = Checkpoint.load(first), Checkpoint.load(second)
    assert end.tokenizer.to_str() == start.tokenizer.to_str()
    name = "encoder.0.self_attention.query.weight"
    assert 0 < float((end.weights[name] - start.weights[name]).abs().max()) < 0.01
    third = Checkpoint.load(train(tmp_path, "third", labelled(), "--init", str(first), loss="classification", steps=1))
    assert float((third.weights[name] - start.weights[name]).abs().max()) < 0.01


def test_a_loss_of_ones_own_is_imported_and_minimised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file of the user's, by its path; one that does not exist ends with a line that says what to do."""
    (tmp_path / "my_losses.py").write_text(
        "def focal(model, batch, config):\n"
        "    logits = model(batch.source_ids, batch.source_lengths, batch.target_inputs).float()\n"
        "    scores = logits.log_softmax(-1).gather(2, batch.target_outputs.unsqueeze(2)).squeeze(2)\n"
        "    loss = -((1 - scores.exp()) ** 2 * scores)\n"
        "    return (loss * (batch.target_outputs != model.config.pad_id)).sum()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    train(tmp_path, "own", translations(), decoder_layers=1, steps=20, loss="my_losses:focal")
    steps = (tmp_path / "own" / "log.jsonl").read_text().splitlines()
    first, last = (float(line.split('"loss": ')[1].split(",")[0]) for line in (steps[0], steps[19]))
    assert last < first - 0.5
    arguments = ["--recipe", f"{tmp_path}/own.toml", "--data", f"{tmp_path}/own.tsv", "--holdout", "0.1"]
    assert main(["train", *arguments, "--output", f"{tmp_path}/x", "--set", "training.loss='my_losses:none'"]) == 2
    assert "my_losses:none cannot be imported" in capsys.readouterr().err
