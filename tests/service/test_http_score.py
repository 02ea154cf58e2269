"""POST /v1/score, against an engine for which every token has log-probability -0.25."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import ValidationFailed
from service.schemas import ScoreResponse
from tests.service.fake_engine import FakeEngine, fake_models


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(engine))) as client:
        yield client


def score(client: TestClient, inputs: Any, targets: Any, **options: Any) -> Any:
    response = client.post("/v1/score", json={"inputs": inputs, "targets": targets, **options})
    assert response.status_code == 200, response.text
    ScoreResponse.model_validate(response.json())
    return response.json()


def test_a_pair_has_the_sum_of_its_tokens(client: TestClient, engine: FakeEngine) -> None:
    """The end token included; both texts reach the engine as token ids with theirs."""
    answer = score(client, "ab", "né")
    assert answer["outputs"] == [{"score": -1.0}]
    assert answer["usage"] == {"source_tokens": 3, "target_tokens": 4}
    assert answer["id"].startswith("score-")
    assert answer["model"] == "echo"
    (sequence,) = engine.received
    assert sequence.kind == sequence.endpoint == "score"
    assert sequence.source_ids == [100, 101, 2]
    assert sequence.target_ids == [113, 198, 172, 2]


def test_pairs_are_answered_in_order(client: TestClient) -> None:
    """One output for each."""
    outputs = score(client, ["a", "b", ""], ["xxx", "", "x"])["outputs"]
    assert [output["score"] for output in outputs] == [-1.0, -0.25, -0.5]


def test_tokens_are_listed_with_their_log_probabilities(client: TestClient) -> None:
    """Their texts join to the target, a character comes with its last token, the end token has none."""
    (output,) = score(client, "a", "né", return_tokens=True)["outputs"]
    assert output["tokens"] == [
        {"id": 113, "text": "n", "logprob": -0.25},
        {"id": 198, "text": "", "logprob": -0.25},
        {"id": 172, "text": "é", "logprob": -0.25},
        {"id": 2, "text": "", "logprob": -0.25},
    ]


def test_a_large_answer_is_the_same(client: TestClient) -> None:
    """It is rendered in a thread."""
    outputs = score(client, ["a"] * 100, ["x" * 40] * 100, return_tokens=True)["outputs"]
    assert outputs == [outputs[0]] * 100
    assert "".join(token["text"] for token in outputs[0]["tokens"]) == "x" * 40


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": "a"}, 422, ["targets", "required"]),
        ({"targets": "a"}, 422, ["inputs", "required"]),
        ({"inputs": ["a", "b"], "targets": ["a", "b", "c"]}, 422, ["2 inputs", "3 targets"]),
        ({"inputs": [], "targets": []}, 422, ["inputs", "at least one"]),
        ({"inputs": "a", "targets": ["a"]}, 422, ["both be a string, or both be lists"]),
        ({"inputs": ["a", "b"], "targets": "a"}, 422, ["both be a string, or both be lists"]),
        ({"inputs": ["a", "b"], "targets": ["a", 3]}, 422, ["targets", "item 1"]),
        ({"inputs": "a", "targets": None}, 422, ["targets"]),
        ({"inputs": "a", "targets": "b", "parameters": {}}, 422, ["parameters", "unknown field"]),
        ({"inputs": "a", "targets": "b", "return_tokens": "yes"}, 422, ["return_tokens"]),
        ({"inputs": ["a", "a"], "targets": ["a", "b" * 48]}, 413, ["targets[1] has 49 tokens", "limit is 48"]),
        ({"inputs": "a", "targets": "b" * 100_000}, 413, ["targets[0] has 100,000 characters"]),
        ({"inputs": ["a", "b" * 64], "targets": ["a", "b"]}, 413, ["inputs[1] has 65 tokens", "limit is 64"]),
        ({"inputs": ["a"] * 1025, "targets": ["a"] * 1025}, 413, ["1,025 inputs"]),
        ({"inputs": "a", "targets": "b", "model": "x"}, 404, ["echo"]),
    ],
)
def test_what_is_refused(client: TestClient, engine: FakeEngine, body: Any, status: int, words: list[str]) -> None:
    """One bad pair refuses the call; nothing reaches the engine."""
    response = client.post("/v1/score", json=body)
    assert response.status_code == status, response.text
    assert all(word in response.json()["error"]["message"] for word in words), response.text
    assert engine.submitted == 0


def test_truncate_cuts_inputs_and_never_targets(client: TestClient) -> None:
    """A score of part of a target would be the score of another text."""
    assert score(client, "b" * 1000, "a", truncate=True)["usage"]["source_tokens"] == 64
    body = {"inputs": "a", "targets": "b" * 48, "truncate": True}
    assert client.post("/v1/score", json=body).status_code == 413


def test_a_model_that_cannot_score_says_so(client: TestClient, engine: FakeEngine) -> None:
    """The engine knows; its refusal reaches the client as it is."""
    engine.refuse_with = ValidationFailed("this artifact has no graph that scores")
    response = client.post("/v1/score", json={"inputs": "a", "targets": "b"})
    assert response.status_code == 422
    assert "no graph that scores" in response.json()["error"]["message"]


def test_the_route_is_counted(client: TestClient) -> None:
    """Under its own name."""
    score(client, "a", "b")
    assert 'endpoint="/v1/score",model_name="echo",status="200"} 1.0' in client.get("/metrics").text
