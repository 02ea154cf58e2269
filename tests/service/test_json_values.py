"""Counting values before they are made."""

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
from service.json_values import spells_more_values_than
from tests.service.fake_engine import FakeEngine, fake_models


def counted(text: bytes) -> int:
    """Character by character."""
    count, inside, escaped = 0, False, False
    for byte in text:
        if byte == ord('"') and not escaped:
            inside = not inside
        elif not inside and byte in b",[{":
            count += 1
        escaped = byte == ord("\\") and not escaped
    return count


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PIECE", 7)
        yield


@given(st.lists(st.sampled_from([b'"', b"\\", b",", b"[", b"{", b"a", "ü".encode()]), max_size=60).map(b"".join))
def test_it_counts_outside_of_texts(text: bytes) -> None:
    """Whatever stands where, escapes and the ends of pieces included."""
    wanted = counted(text)
    assert not spells_more_values_than(wanted, text)
    assert wanted == 0 or spells_more_values_than(wanted - 1, text)


@given(
    st.recursive(
        st.text() | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_value_has_no_more_than_are_counted(value: object) -> None:
    """One of them, the first, has neither a comma before it nor a bracket."""

    def values(value: object) -> int:
        members = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        return 1 + sum(map(values, members))

    assert values(value) <= counted(json.dumps(value).encode()) + 1


LARGE = 7_000_000


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'""', b"1", b'{"":[]}', b'"\\","'])
def test_a_body_of_millions_of_values_is_413(monkeypatch: pytest.MonkeyPatch, unit: bytes) -> None:
    """Before any of them is made, which would take seconds and hundreds of megabytes."""
    monkeypatch.setattr(json_values, "_PIECE", 1 << 18)
    monkeypatch.setattr("service.body.parse_json", lambda body: pytest.fail("it was parsed"))
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
