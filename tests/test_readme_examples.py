"""The README's examples of the API, run for real: the default model gives the answers that stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.models import Models
from tests.service.real_model import running

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"^\$ curl (?:-N )?localhost:8000(/v1/\w+) -d '(.*)'\n((?:(?!\$ |```).*\n)+)", README, re.MULTILINE
)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running() as model, TestClient(create_app(Models([model]))) as client:
        yield client


def test_there_are_examples() -> None:
    """Of every route that takes a body."""
    assert {path for path, _, _ in EXAMPLES} == {"/v1/generate", "/v1/encode", "/v1/score"}


@pytest.mark.parametrize(("path", "body", "shown"), EXAMPLES)
def test_an_example_gives_what_it_shows(client: TestClient, path: str, body: str, shown: str) -> None:
    """But for ids, the last digits of numbers, how a stream was cut into events, and what is cut off with dots."""
    found = client.post(path, content=body).text
    if shown.rstrip().endswith("..."):
        assert _without_ids(found).startswith(_without_ids(shown.rstrip().removesuffix("...")))
    elif found.startswith("data: "):
        assert _told(found) == _told(shown)
    else:
        assert _rounded(json.loads(_without_ids(found))) == _rounded(json.loads(_without_ids(shown)))


def _without_ids(text: str) -> str:
    return re.sub(r'"(gen|enc|score)-[0-9a-f]{32}"', r'"\1"', text)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-3)
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return {name: _rounded(one) for name, one in value.items()} if isinstance(value, dict) else value


def _told(stream: str) -> tuple[str, Any, str]:
    """The whole text of a stream, its last event without what is only its own, and its end."""
    *events, done = [line.removeprefix("data: ") for line in stream.split("\n") if line]
    told = [json.loads(_without_ids(event)) for event in events]
    return "".join(event["text"] for event in told), {**told[-1], "text": ""}, done
