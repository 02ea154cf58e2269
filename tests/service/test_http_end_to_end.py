"""HTTP with the real engine and the tiny model: random weights, real graphs, real tokenizer."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.models import Models
from tests.service.real_model import TEXTS, running


@pytest.fixture(scope="module")
def client(tiny_artifact: Path) -> Iterator[TestClient]:
    with running(tiny_artifact, max_rows=8) as model, TestClient(create_app(Models([model]))) as client:
        yield client


def generate(client: TestClient, inputs: Any, **parameters: Any) -> dict[str, Any]:
    response = client.post("/v1/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def test_alone_and_together_are_the_same_bits(client: TestClient) -> None:
    """Text, score and tokens of each input, in one call and in calls of one at the same time."""
    options = {"return_scores": True, "return_tokens": True}
    alone = [generate(client, text, **options)["outputs"][0] for text in TEXTS]
    assert generate(client, TEXTS, **options)["outputs"] == alone
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: generate(client, text, **options)["outputs"][0], TEXTS * 8))
    assert answers == alone * 8


def test_a_stream_joins_to_the_unstreamed_answer(client: TestClient) -> None:
    """For texts full of broken characters, as random weights write them."""
    whole = [output["sequences"][0] for output in generate(client, TEXTS, return_scores=True)["outputs"]]
    body = {"inputs": TEXTS, "stream": True, "parameters": {"return_scores": True}}
    *lines, done, _ = client.post("/v1/generate", json=body).text.split("\n\n")
    assert done == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    joined = ["".join(event["text"] for event in events if event["index"] == index) for index in range(len(TEXTS))]
    assert joined == [sequence["text"] for sequence in whole]
    ends = {event["index"]: (event["finish_reason"], event["score"]) for event in events if event["finish_reason"]}
    assert ends == {index: (one["finish_reason"], one["score"]) for index, one in enumerate(whole)}


def test_vectors_alone_and_together_are_the_same_bits(client: TestClient) -> None:
    """For every pooling."""
    for pooling in ("mean", "max", "first", "none"):
        options = {"pooling": pooling, "encoding_format": "base64"}
        alone = [client.post("/v1/encode", json={"inputs": text, **options}).json()["embeddings"][0] for text in TEXTS]
        assert client.post("/v1/encode", json={"inputs": TEXTS, **options}).json()["embeddings"] == alone


def test_tokens_join_to_the_text_and_score_is_their_sum(client: TestClient) -> None:
    """Of a real answer."""
    answer = generate(client, TEXTS[0], return_tokens=True, return_scores=True, length_penalty=0)
    (sequence,) = answer["outputs"][0]["sequences"]
    assert "".join(token["text"] for token in sequence["tokens"]) == sequence["text"]
    assert sequence["score"] == pytest.approx(sum(token["logprob"] for token in sequence["tokens"]))
    assert answer["usage"]["generated_tokens"] == len(sequence["tokens"])


def test_the_limits_are_the_manifests(client: TestClient) -> None:
    """64 source tokens, 48 new ones."""
    assert client.post("/v1/generate", json={"inputs": "cat " * 100}).status_code == 413
    assert generate(client, "cat " * 100, truncate=True)["usage"]["source_tokens"] == 64
    response = client.post("/v1/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 49}})
    assert "between 1 and 48" in response.json()["error"]["message"]


def test_the_counts_of_requests_add_up(client: TestClient) -> None:
    """Each input that was accepted is counted once, by how it ended."""

    def finished() -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("transduce_requests_total"))

    before = finished()
    generate(client, TEXTS)
    client.post("/v1/encode", json={"inputs": TEXTS})
    assert finished() - before == 2 * len(TEXTS)
