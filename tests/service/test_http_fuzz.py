"""Requests that nobody means: whatever the bytes, the answer is one of the contract's and never a 500."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.app import create_app
from service.schemas import ErrorResponse, Parameters
from tests.service.fake_engine import FakeEngine, fake_models

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=80)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["inputs", "targets", "model", "stream", "parameters", "pooling", "normalize", "encoding_format", "extra"]
)
PARAMETERS = st.dictionaries(st.sampled_from([*Parameters.model_fields, "extra"]), VALUES, max_size=3)
BODIES = VALUES | st.dictionaries(NAMES, VALUES, max_size=4) | st.fixed_dictionaries(
    {"inputs": st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=3)},
    optional={"parameters": PARAMETERS, "stream": st.booleans(), "targets": st.text(max_size=20)},
)  # fmt: skip
GOOD = {
    "max_new_tokens": st.integers(1, 48), "min_new_tokens": st.integers(0, 48), "num_beams": st.integers(1, 9),
    "num_return_sequences": st.integers(1, 9), "length_penalty": st.floats(-10, 10), "do_sample": st.booleans(),
    "early_stopping": st.sampled_from([True, False, "never"]), "temperature": st.floats(0.001, 100),
    "top_k": st.integers(0, 1000), "top_p": st.floats(0.01, 1), "seed": st.integers(0, 2**63 - 1),
    "repetition_penalty": st.floats(0.01, 100), "no_repeat_ngram_size": st.integers(0, 1000),
    "stop": st.lists(st.text(max_size=3), max_size=3), "suppress": st.lists(st.text(max_size=3), max_size=3),
    "prefix": st.text(max_size=10), "return_alternatives": st.booleans(), "return_scores": st.booleans(),
    "return_tokens": st.booleans(), "return_alignments": st.booleans(), "truncate": st.booleans(),
}  # fmt: skip
CONTRACT = {200, 400, 404, 405, 413, 422}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(FakeEngine()))) as client:
        yield client


def claim(response: Any) -> None:
    """The status is one of the contract's, and so is the shape of the body."""
    assert response.status_code in CONTRACT, response.text
    response.content.decode()
    if response.status_code >= 400:
        assert ErrorResponse.model_validate(response.json()).request_id == response.headers["x-request-id"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/v1/generate", "/v1/encode", "/v1/classify", "/v1/score"]), body=BODIES)
def test_any_json_is_answered(client: TestClient, path: str, body: Any) -> None:
    """Escapes of lone surrogates, NaN, huge numbers and wrong types included."""
    claim(client.post(path, content=json.dumps(body).encode()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=20), parameters=st.fixed_dictionaries({}, optional=GOOD), stream=st.booleans()
)  # fmt: skip
def test_any_mix_of_parameters_is_answered(
    client: TestClient, text: str, parameters: dict[str, Any], stream: bool
) -> None:
    """Each of them in its range: they go together, or a message says which do not."""
    body = {"inputs": text, "parameters": parameters, "stream": stream}
    response = client.post("/v1/generate", content=json.dumps(body).encode())
    claim(response)
    if response.status_code == 422:
        assert "parameters." in response.json()["error"]["message"]
    elif stream:
        assert response.text.endswith("data: [DONE]\n\n")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), content_type=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])))
def test_any_bytes_are_answered(client: TestClient, body: bytes, content_type: str) -> None:
    """Whatever the content type."""
    claim(client.post("/v1/generate", content=body, headers={b"content-type": content_type.encode("latin-1")}))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"]),
    path=st.sampled_from(
        ["/", "/docs", "/metrics", "/healthz", "/readyz", "/openapi.json", "/v1/models", "/v1/generate"]
    )
    | st.text(max_size=30).map("/{}".format),
)
def test_any_route_is_answered(client: TestClient, method: str, path: str) -> None:
    """Any method anywhere; a redirect is the front door's."""
    response = client.request(method, quote(path), follow_redirects=False)
    if method == "HEAD" or response.status_code == 307:
        assert response.status_code in {*CONTRACT, 307}
    else:
        claim(response)
