"""What the service says about itself: /docs, /openapi.json, /v1/models, /metrics, /."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service import schemas
from service.app import create_app
from tests.service.fake_engine import FakeEngine, fake_models


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(FakeEngine()))) as client:
        yield client


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    return client.get("/openapi.json").json()  # type: ignore[no-any-return]


def test_the_documentation_needs_no_other_server(client: TestClient) -> None:
    """Every address in the page is relative and is answered here."""
    page = client.get("/docs").text
    addresses = re.findall(r"(?:href|src)=\"([^\"]+)\"", page) + re.findall(r"url: '([^']+)'", page)
    assert len(addresses) == 4
    for address in addresses:
        assert not address.startswith(("http", "/"))
        answer = client.get("/" + address)
        assert answer.status_code == 200
        assert len(answer.content) > 500
    assert client.get("/docs/swagger-ui.css").headers["content-type"].startswith("text/css")


@pytest.mark.parametrize("path", ["/docs", "/docs/swagger-ui.css", "/openapi.json", "/v1/models", "/healthz", "/"])
def test_every_route_is_counted_under_its_own_name(client: TestClient, path: str) -> None:
    client.get(path, follow_redirects=False)
    assert f'transduce_http_requests_total{{endpoint="{path}",' in client.get("/metrics").text


def test_the_front_door_leads_to_the_documentation(client: TestClient) -> None:
    """By a relative redirect, which holds behind a proxy's prefix."""
    assert client.get("/", follow_redirects=False).headers["location"] == "docs"
    assert client.get("/").status_code == 200


def test_every_reference_in_the_document_resolves(document: dict[str, Any]) -> None:
    """Schemas that FastAPI does not see are in it too."""
    names = re.findall(r"#/components/schemas/(\w+)", str(document))
    assert {
        "GenerateRequest",
        "EncodeRequest",
        "ClassifyRequest",
        "ScoreRequest",
        "ErrorResponse",
        "StreamEvent",
        "Parameters",
    } <= set(names)
    assert set(names) <= set(document["components"]["schemas"])


def test_the_documents_examples_are_valid(client: TestClient, document: dict[str, Any]) -> None:
    """Each is a request that this server answers with 200."""
    for path in ("/v1/generate", "/v1/encode", "/v1/classify", "/v1/score"):
        examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        assert len(examples) >= 2
        for example in examples.values():
            assert client.post(path, json=example["value"]).status_code == 200


def test_the_documents_answers_are_of_the_documents_schemas(document: dict[str, Any]) -> None:
    """The example of each 200 is what its schema says."""
    for path, schema in (
        ("/v1/generate", schemas.GenerateResponse),
        ("/v1/encode", schemas.EncodeResponse),
        ("/v1/classify", schemas.ClassifyResponse),
        ("/v1/score", schemas.ScoreResponse),
    ):
        answer = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        assert answer["schema"]["$ref"].endswith(f"/{schema.__name__}")
        schema.model_validate(answer["example"])


def test_the_document_names_every_error(document: dict[str, Any]) -> None:
    """With the one shape, and no mention of the framework's own."""
    for path in ("/v1/generate", "/v1/encode", "/v1/classify", "/v1/score"):
        responses = document["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "404", "413", "422", "429", "500", "503", "504"}
        for status, response in responses.items():
            if status != "200":
                schema = response["content"]["application/json"]["schema"]
                assert schema["$ref"] == "#/components/schemas/ErrorResponse"
                schemas.ErrorResponse.model_validate(response["content"]["application/json"]["example"])
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_document_has_every_parameter_explained(document: dict[str, Any]) -> None:
    """Each field of a request has a description."""
    for name in ("GenerateRequest", "Parameters", "EncodeRequest", "ScoreRequest"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description") or "$ref" in schema, f"{name}.{field}"


def test_the_models_are_listed_with_their_limits(client: TestClient) -> None:
    """In the manifest's words."""
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "echo"
    assert (card["max_source_tokens"], card["max_target_tokens"], card["embedding_size"]) == (64, 48, 4)
    assert card["created"] == 1795392000
    assert card["engine"]["provider"] == "fake"


def test_metrics_count_by_route_and_status_with_bounded_labels(client: TestClient) -> None:
    """Unknown paths are one label, however many there are; failures count inputs, by type."""
    for number in range(20):
        client.get(f"/stranger/{number}")
    client.post("/v1/generate", json={"inputs": ["a", "b"]})
    client.post("/v1/generate", json={"inputs": ["a", "b" * 99]})
    client.get("/v1/generate")
    text = client.get("/metrics").text
    labels = 'model_name="echo"'
    assert f'transduce_http_requests_total{{endpoint="unknown",{labels},status="404"}} 20.0' in text
    assert f'transduce_http_requests_total{{endpoint="/v1/generate",{labels},status="200"}} 1.0' in text
    assert f'transduce_http_requests_total{{endpoint="/v1/generate",{labels},status="405"}} 1.0' in text
    assert f'transduce_request_failures_total{{{labels},type="too_large"}} 2.0' in text
    assert "stranger" not in text


def test_metrics_speak_both_formats(client: TestClient) -> None:
    """Prometheus text by default, OpenMetrics for a client that asks."""
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
