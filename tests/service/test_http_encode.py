"""POST /v1/encode, against an engine whose vectors are known: (x, 2x, -x, 0) for token x."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.schemas import EncodeResponse
from tests.service.fake_engine import FakeEngine, fake_models

A, EOS = ord("a") + 3, 2


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(FakeEngine()))) as client:
        yield client


def encode(client: TestClient, inputs: Any, **options: Any) -> Any:
    response = client.post("/v1/encode", json={"inputs": inputs, **options})
    assert response.status_code == 200, response.text
    EncodeResponse.model_validate(response.json())
    return response.json()


def vector(x: float) -> list[float]:
    return [x, 2 * x, -x, 0]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [vector((A + EOS) / 2)]),
        ("max", [[A, 2 * A, -EOS, 0]]),
        ("first", [vector(A)]),
        ("none", [[vector(A), vector(EOS)]]),
    ],
)
def test_pooling(client: TestClient, pooling: str, expected: Any) -> None:
    """Mean, maximum, first, or all vectors of a text's own tokens, end token included."""
    answer = encode(client, "a", pooling=pooling, normalize=False)
    assert answer["embeddings"] == expected
    assert answer["usage"] == {"source_tokens": 2}


def test_vectors_have_length_one_by_default(client: TestClient) -> None:
    """After pooling; with pooling none each token's vector has."""
    assert np.linalg.norm(encode(client, ["a", "b"])["embeddings"], axis=-1) == pytest.approx([1, 1])
    assert np.linalg.norm(encode(client, "a", pooling="none")["embeddings"], axis=-1) == pytest.approx(np.ones((1, 2)))


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_base64_is_the_same_numbers(client: TestClient, pooling: str) -> None:
    """Little-endian float32, row by row: bit for bit what the decimal digits give."""
    decimal = encode(client, ["ab", "c"], pooling=pooling)["embeddings"]
    packed = encode(client, ["ab", "c"], pooling=pooling, encoding_format="base64")["embeddings"]
    for numbers, text in zip(decimal, packed, strict=True):
        assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == np.float32(numbers).ravel().tolist()


def test_an_empty_text_is_its_end_token(client: TestClient) -> None:
    """There is a vector for it, as for any text."""
    assert encode(client, "", normalize=False)["embeddings"] == [vector(EOS)]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"inputs": "a", "pooling": "sum"}, 422, "pooling"),
        ({"inputs": "a", "normalize": "yes"}, 422, "normalize"),
        ({"inputs": "a", "encoding_format": "hex"}, 422, "encoding_format"),
        ({"inputs": "a", "stream": True}, 422, "stream"),
        ({"inputs": ["a", "b" * 64]}, 413, "inputs[1]"),
        ({"inputs": ["a"] * 1025}, 413, "1,025 inputs"),
        ({"inputs": "a", "model": "x"}, 404, "echo"),
    ],
)
def test_what_is_refused(client: TestClient, body: Any, status: int, word: str) -> None:
    """As for generate, naming what is wrong."""
    response = client.post("/v1/encode", json=body)
    assert response.status_code == status
    assert word in response.json()["error"]["message"]


def test_truncate(client: TestClient) -> None:
    """Cut to the limit instead."""
    assert encode(client, "b" * 1000, truncate=True)["usage"] == {"source_tokens": 64}


def test_an_answer_of_too_many_numbers_is_refused_before_the_work(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector per token can be a gigabyte for a small request."""
    monkeypatch.setattr("service.encode.MAX_NUMBERS", 39)
    body = {"inputs": ["aaaa", "bbbb"], "pooling": "none"}
    assert client.post("/v1/encode", json=body).status_code == 413
    assert client.post("/v1/encode", json={**body, "pooling": "mean"}).status_code == 200
