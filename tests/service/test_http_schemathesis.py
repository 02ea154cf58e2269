"""The service against its own OpenAPI document: thousands of requests made of it, valid ones and others."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.service.fake_server import serving
from tests.service.real_model import TEXTS, running

CASES = 5000
"""At least so many in all."""


@pytest.fixture
def url(tiny_artifact: Path) -> Iterator[str]:
    with running(tiny_artifact, max_rows=16) as model, serving(model) as port:
        yield f"http://127.0.0.1:{port}"


def operations(url: str) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def ordinary(client: httpx.Client, url: str) -> list[Any]:
    """What the model says to some texts, by each route: texts, vectors and scores."""
    said = []
    for path, more in (("generate", {"parameters": {"num_beams": 2}}), ("encode", {}), ("score", {"targets": TEXTS})):
        response = client.post(f"{url}/v1/{path}", json={"inputs": TEXTS, **more})
        assert response.status_code == 200, response.text
        answer = response.json()
        said.append(answer.get("outputs") or answer["embeddings"])
    return said


def _named(name: str, case: Any) -> tuple[str, Any]:
    return name, case


def play(url: str, mode: GenerationMode, examples: int, client: httpx.Client, every: int) -> Counter[str]:
    """So many cases for each operation; the statuses by operation. After every so many an ordinary request."""
    wanted = ordinary(client, url)
    seen: Counter[str] = Counter()

    def check(named: tuple[str, Any]) -> None:
        name, case = named
        response = case.call(timeout=30)
        seen[f"{name} {response.status_code}"] += 1
        # A server error is one that the document promises: the line may be full, or a request's time over.
        assert response.status_code < 500 or response.status_code in (503, 504), response.content
        case.validate_response(response, excluded_checks=[not_a_server_error, positive_data_acceptance])
        if response.status_code >= 400 and case.method != "HEAD":
            body = json.loads(response.content)
            assert set(body) == {"error", "request_id"}
            assert set(body["error"]) == {"type", "message"}
        if sum(seen.values()) % every == 0:
            assert ordinary(client, url) == wanted

    many = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for name, operation in operations(url).items():
        of_operation = operation.as_strategy(generation_mode=mode)
        cases = of_operation.map(partial(_named, name))
        try:
            many(given(cases)(check))()
        except Unsatisfiable:  # nothing can be wrong about a request that takes nothing
            assert mode is GenerationMode.NEGATIVE
            assert name.startswith("GET ")
    assert ordinary(client, url) == wanted
    return seen


def test_some_cases_of_every_operation(url: str) -> None:
    """Of each kind; so many that every run shows whether document and service agree."""
    with httpx.Client(timeout=60) as client:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            seen = play(url, mode, 15, client, every=50)
            wanted = "200" if mode is GenerationMode.POSITIVE else "422"
            assert any(status.endswith(wanted) for status in seen)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thousands_of_cases(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """No error of the server's own, no answer that the document does not promise, ordinary ones in between exact."""
    caplog.set_level(logging.ERROR)
    with httpx.Client(timeout=60) as client:
        seen: Counter[str] = Counter()
        for mode, examples in ((GenerationMode.POSITIVE, 500), (GenerationMode.NEGATIVE, 800)):
            seen += play(url, mode, examples, client, every=200)
    assert sum(seen.values()) >= CASES
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
