"""Large answers: what they may take together, and that clients who do not take theirs cost others nothing else."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from service import answer, large_answers, protocol
from service.app import create_app
from service.large_answers import BASE64_NUMBER_BYTES, NUMBER_BYTES, PIECE_BYTES, in_pieces
from service.vectors import as_base64
from tests.service.fake_engine import FakeEngine, fake_models
from tests.service.fake_server import RunningServer, running
from tests.service.sockets import (
    asking_for_vectors,
    connected_with_small_buffers,
    eventually,
    exchange,
    give_small_buffers,
    post,
    troubles,
)

TEXT = "a" * 60

LARGE = {"inputs": [TEXT] * 100, "pooling": "none"}
"""Of 100 * 61 * 4 numbers."""


def test_a_large_answer_comes_whole() -> None:
    """In pieces of which nothing is seen outside."""
    with running(FakeEngine()) as server:
        head, _, body = exchange(server.port, asking_for_vectors(1000, "Connection: close")).partition(b"\r\n\r\n")
        assert len(body) > 30 * PIECE_BYTES
        assert f"content-length: {len(body)}".encode() in head
        found = np.array(json.loads(body)["embeddings"])
        alone = httpx.post(f"{server.url}/v1/encode", json=LARGE | {"inputs": [TEXT]}).json()["embeddings"]
        assert found.shape == (1000, 61, 4)
        assert (found == alone).all()


def room_for_another(server: RunningServer) -> bool:
    """Whether there is; where there is none, what the refusal says."""
    response = httpx.post(f"{server.url}/v1/encode", json=LARGE)
    if response.status_code == 200:
        return True
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert "of the 500,000 that there may be are held by other large answers" in response.json()["error"]["message"]
    return False


def test_answers_that_are_not_taken_leave_no_room_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until their clients are gone; small ones are given all the while."""
    give_small_buffers(monkeypatch)
    with running(FakeEngine(), max_answers_bytes=500_000) as server:
        with connected_with_small_buffers(server) as connection:
            connection.sendall(asking_for_vectors(100))
            assert eventually(lambda: not room_for_another(server))
            assert httpx.post(f"{server.url}/v1/generate", json={"inputs": "a"}).status_code == 200
            assert httpx.post(f"{server.url}/v1/encode", json=LARGE | {"pooling": "mean"}).status_code == 200
            assert not room_for_another(server)
        assert eventually(lambda: room_for_another(server))


def test_who_takes_next_to_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not keep an answer here."""
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.5)
    give_small_buffers(monkeypatch)
    with (
        running(FakeEngine(), max_answers_bytes=500_000) as server,
        connected_with_small_buffers(server) as connection,
    ):
        connection.sendall(asking_for_vectors(100))
        assert connection.recv(1) == b"H"
        assert eventually(lambda: connection.recv(1) and troubles(server, "stalled_reader") == 1)
        assert eventually(lambda: room_for_another(server))
        assert troubles(server, "client_left") == 0


STREAM = {"inputs": [TEXT] * 40, "stream": True, "parameters": {"return_tokens": True}}


@pytest.mark.parametrize("asked", [asking_for_vectors(100), post(json.dumps(STREAM).encode())])
def test_who_takes_a_large_answer_too_slowly_is_cut_off(monkeypatch: pytest.MonkeyPatch, asked: bytes) -> None:
    """Steadily, so that it never stalls, but others wait for the room that it holds; be it whole or a stream."""
    monkeypatch.setattr(large_answers, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(large_answers, "SLOWEST_BYTES_PER_SECOND", 1e9)
    give_small_buffers(monkeypatch)
    with (
        running(FakeEngine(), max_answers_bytes=500_000) as server,
        connected_with_small_buffers(server) as connection,
    ):
        connection.sendall(asked)

        def take_some() -> bool:
            time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                return len(connection.recv(1000)) == 0 or troubles(server, "stalled_reader") == 1
            return True

        assert eventually(take_some)
        assert troubles(server, "stalled_reader") == 1
        assert eventually(lambda: room_for_another(server))
        assert troubles(server, "client_left") == 0


def test_a_large_answer_may_be_taken_at_a_bounded_pace() -> None:
    """A minute, and a second for each 128 KiB."""
    assert large_answers.seconds_for(0) == 60
    assert large_answers.seconds_for(128 * 1024 * 600) == 660


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/encode", LARGE),
        ("/v1/encode", LARGE | {"encoding_format": "base64"}),
        ("/v1/generate", {"inputs": [TEXT] * 100, "parameters": {"return_alignments": True}}),
        ("/v1/generate", {"inputs": [TEXT] * 100, "parameters": {"return_alignments": True}, "stream": True}),
        ("/v1/generate", {"inputs": [TEXT] * 100, "parameters": {"return_tokens": True}}),
        ("/v1/generate", {"inputs": [TEXT] * 50, "stream": True}),
        ("/v1/generate", {"inputs": [TEXT] * 500}),
        ("/v1/score", {"inputs": [TEXT] * 100, "targets": ["b" * 40] * 100, "return_tokens": True}),
        ("/v1/classify", {"inputs": [TEXT] * 200}),
    ],
)
def test_what_could_be_larger_than_all_may_be_is_413(path: str, asked: dict[str, Any]) -> None:
    """Known before any work is done; one of its inputs alone is answered."""
    engine = FakeEngine()
    with TestClient(create_app(fake_models(engine, max_answers_bytes=100_000))) as client:
        response = client.post(path, json=asked)
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "too_large"
        assert "the limit is 100,000; send fewer inputs" in response.json()["error"]["message"]
        part = {name: value[:1] if isinstance(value, list) else value for name, value in asked.items()}
        assert client.post(path, json=part).status_code == 200


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_pieces_are_the_body(size: int) -> None:
    """In order, none above the bound."""
    body = np.random.default_rng(1).bytes(size)
    pieces = list(in_pieces(memoryview(body)))
    assert b"".join(pieces) == body
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)


def test_numbers_take_no_more_than_was_reckoned() -> None:
    """Of any size, as text and as base64."""
    rng = np.random.default_rng(1)
    numbers = (rng.standard_normal((100, 256)) * 10.0 ** rng.integers(-9, 9, (100, 256))).astype(np.float32)
    assert len(answer.as_json(numbers)) + numbers.nbytes < NUMBER_BYTES * numbers.size
    assert len(as_base64(numbers)) + numbers.nbytes < BASE64_NUMBER_BYTES * numbers.size
