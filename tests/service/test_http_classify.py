"""POST /v1/classify, on a real classifier of random weights, and what such a model refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from export.exporter import ExportRequest, export_artifact
from model.checkpoint import Checkpoint
from model.data import pad_rows
from model.tokenizer import encode_texts
from service.app import create_app
from service.cli import main
from service.models import Models
from service.schemas import ClassifyResponse
from tests import tiny
from tests.service.real_model import TEXTS, running

LABELS = {"calm", "glad", "sad"}


@pytest.fixture(scope="module")
def client(tiny_classifier_artifact: Path) -> Iterator[TestClient]:
    with running(tiny_classifier_artifact) as model, TestClient(create_app(Models([model]))) as client:
        yield client


def classify(client: TestClient, inputs: object, **more: Any) -> list[dict[str, float]]:
    """The probability of each label, text by text."""
    response = client.post("/v1/classify", json={"inputs": inputs, **more})
    assert response.status_code == 200, response.text
    outputs = ClassifyResponse.model_validate(response.json()).outputs
    for labels in outputs:
        scores = [label.score for label in labels]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-6)
    return [{label.label: label.score for label in labels} for labels in outputs]


def test_labels_are_pytorchs_with_their_probabilities(
    client: TestClient, tiny_classifier_checkpoint: Checkpoint
) -> None:
    """For 60 sentences; each label is the likeliest of some."""
    texts = tiny.sentences(60, seed=3)
    config = tiny_classifier_checkpoint.recipe.model
    rows = [[*ids, 2] for ids in encode_texts(tiny_classifier_checkpoint.tokenizer, texts)]
    with torch.no_grad():
        logits = tiny_classifier_checkpoint.transformer().classify(
            pad_rows(rows, 0), torch.tensor([len(row) for row in rows])
        )
    expected = logits.softmax(dim=-1).tolist()
    found = classify(client, texts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(dict(zip(config.labels, theirs, strict=True)), abs=1e-5)
    assert {max(scores, key=lambda label: scores[label]) for scores in found} == LABELS


def test_alone_is_batched(client: TestClient) -> None:
    """The same bits for each text, whoever is beside it."""
    texts = [*TEXTS, *tiny.sentences(30)]
    assert classify(client, texts) == [classify(client, text)[0] for text in texts]


def test_the_answer_says_what_was_read(client: TestClient) -> None:
    answer = client.post("/v1/classify", json={"inputs": ["", "a"]}).json()
    assert answer["id"].startswith("class-")
    assert answer["usage"] == {"source_tokens": 3}
    metrics = client.get("/metrics").text
    assert 'requests_total{endpoint="classify",finish_reason="stop"' in metrics


def test_a_text_that_is_too_long_is_refused_or_cut(client: TestClient) -> None:
    long = "the cat " * 200
    refusal = client.post("/v1/classify", json={"inputs": ["a", long]})
    assert refusal.status_code == 413
    assert "inputs[1]" in refusal.json()["error"]["message"]
    assert len(classify(client, ["a", long], truncate=True)) == 2


@pytest.mark.parametrize(("path", "more"), [("/v1/generate", {}), ("/v1/score", {"targets": "b"})])
def test_an_encoder_alone_writes_no_texts(client: TestClient, path: str, more: dict[str, Any]) -> None:
    refusal = client.post(path, json={"inputs": "a", **more})
    assert refusal.status_code == 422
    assert "no decoder" in refusal.json()["error"]["message"]
    assert client.post("/v1/encode", json={"inputs": "a"}).status_code == 200


def test_a_translator_has_no_labels(tiny_artifact: Path) -> None:
    with running(tiny_artifact) as model, TestClient(create_app(Models([model]))) as client:
        refusal = client.post("/v1/classify", json={"inputs": "a"})
    assert refusal.status_code == 422
    assert "no labels" in refusal.json()["error"]["message"]


def test_the_artifact_is_checked_by_its_labels(
    tiny_classifier_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_classifier_artifact)]) == 0
    assert "8 sentences, answers right" in capsys.readouterr().out


def test_a_translation_by_a_classifier_is_refused(
    tiny_classifier_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("a\n")
    assert main(["translate", "--model", str(tiny_classifier_artifact), "--input", str(tmp_path / "lines.txt")]) != 0
    assert "no decoder" in capsys.readouterr().err


def test_a_classifier_is_served_in_integers(
    tiny_classifier_checkpoint: Checkpoint, tmp_path: Path, tiny_sentences: Path
) -> None:
    """Within the bounds of the parity check, and served."""
    tiny_classifier_checkpoint.save(tmp_path / "model.pt")
    request = ExportRequest(tmp_path / "model.pt", tmp_path / "artifact", "int8", tiny_sentences, cuda=False)
    manifest = export_artifact(request)
    assert manifest["parity"]["cpu"]["equal_labels"] > 0.97
    with running(tmp_path / "artifact") as model, TestClient(create_app(Models([model]))) as client:
        assert set(classify(client, "the cat")[0]) == LABELS
