"""Looking at a body before it is parsed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service import json_values
from service.app import create_app
from service.json_values import exceeded
from tests.service.fake_engine import FakeEngine, fake_models


def looked_at(text: bytes) -> tuple[int, int]:
    """Values and depth, character by character."""
    values, depth, deepest, inside, escaped = 0, 0, 0, False, False
    for byte in text:
        if byte == ord('"') and not escaped:
            inside = not inside
        elif not inside:
            values += byte in b",[{"
            depth += (byte in b"[{") - (byte in b"]}")
            deepest = max(depth, deepest)
        escaped = byte == ord("\\") and not escaped
    return values, deepest


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PIECE", 7)
        yield


PIECES = [b'"', b"\\", b",", b"[", b"]", b"{", b"}", b"a", "ü".encode()]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join))
def test_it_looks_outside_of_texts(text: bytes) -> None:
    """Whatever stands where, escapes and the ends of pieces included."""
    values, depth = looked_at(text)
    assert exceeded(text, max_values=values, max_depth=depth) is None
    assert values == 0 or exceeded(text, max_values=values - 1, max_depth=60) == "values"
    assert depth == 0 or exceeded(text, max_values=60, max_depth=depth - 1) == "depth"


VALUES = st.recursive(st.text() | st.none() | st.integers(), lambda of: st.lists(of) | st.dictionaries(st.text(), of))


@given(VALUES)
def test_a_value_has_no_more_than_are_counted(value: object) -> None:
    """One of them, the first, has neither a comma before it nor a bracket. The depth is exact."""

    def members(value: object) -> list[object]:
        return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []

    def values(value: object) -> int:
        return 1 + sum(map(values, members(value)))

    def depth(value: object) -> int:
        return isinstance(value, (dict, list)) + max(map(depth, members(value)), default=0)

    text = json.dumps(value).encode()
    assert exceeded(text, max_values=values(value), max_depth=depth(value)) != "depth"
    assert values(value) <= looked_at(text)[0] + 1
    assert looked_at(text)[1] == depth(value)


LARGE = 7_000_000


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'""', b"1", b'{"":[]}', b'"\\","'])
def test_a_body_of_millions_of_values_is_413(monkeypatch: pytest.MonkeyPatch, unit: bytes) -> None:
    """Before any of them is made, which would take seconds and hundreds of megabytes."""
    monkeypatch.setattr(json_values, "_PIECE", 1 << 18)
    body = b'{"inputs": [' + b",".join([unit] * (LARGE // (len(unit) + 1))) + b"]}"
    with TestClient(create_app(fake_models(FakeEngine(), max_body_bytes=2**23))) as client:
        began = time.process_time()
        response = client.post("/v1/generate", content=body)
        assert time.process_time() - began < 1.5
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the body has more than 65,536 values; send fewer inputs per call"


def test_a_large_body_of_texts_is_no_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commas, brackets and quotes count nothing."""
    monkeypatch.setattr(json_values, "_PIECE", 1 << 18)
    text = 'if (a[0], b[1]) { say "x, y"; } \\ '
    inputs = [text] + [text * 6000] * 30
    with TestClient(create_app(fake_models(FakeEngine(), max_body_bytes=2**23))) as client:
        response = client.post("/v1/encode", json={"inputs": inputs, "truncate": True})
    assert response.status_code == 200
    assert len(response.json()["embeddings"]) == 31
