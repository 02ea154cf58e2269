"""Keys: who is let in, on which routes, what is said to the others, and that a key is written down nowhere."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.commands.serve import _announce
from service.errors import SettingsError
from service.keys import Entry, Keys, make_key
from service.settings import Settings
from tests.service.fake_engine import FakeEngine, fake_models
from tests.service.test_http_refusals import refusal

ALICE, ALICES = make_key("alice")
BOB, BOBS = make_key("bob")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n{ALICES}  # until March\n\n{BOBS}\n")
    return path


@pytest.fixture
def client(file: Path) -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(api_key_file=str(file)))) as client:
        yield client


def test_a_key_is_long_random_and_known_by_its_hash() -> None:
    key, entry = make_key("carol-2")
    assert key.startswith("td-")
    assert len(key) >= 43
    assert str(entry) == f"carol-2:{hashlib.sha256(key.encode()).hexdigest()}"
    assert make_key("carol-2")[0] != key
    for name in ("", "two words", "a:b", "-a", "x" * 65):
        with pytest.raises(SettingsError, match="no client's name"):
            make_key(name)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/generate", "/docs", "/openapi.json", "/metrics", "/nowhere"])
def test_every_route_wants_a_key(client: TestClient, method: str, path: str) -> None:
    """Every route of the app, also those that do not exist: what is there is not told to strangers."""
    response = client.request(method, path, content=b"{}" if method == "POST" else None)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert client.request(method, path, headers=bearer(ALICE), follow_redirects=False).status_code != 401


def test_the_routes_that_are_tested_are_all(client: TestClient) -> None:
    """But health, which a probe without a key asks; a path that only begins like it is not health."""
    paths = {getattr(route, "path", "") for route in client.app.routes}  # type: ignore[attr-defined]
    for path in paths - {"/healthz", "/readyz"}:
        assert client.get(path, follow_redirects=False).status_code == 401, path
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    for near in ("/healthz/", "/readyz/x", "/healthz%2f..", "//healthz"):
        assert client.get(near).status_code == 401, near


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {ALICE}",
        ALICE,
        f"Bearer {ALICE}x",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE} {ALICE}",
        f"Bearer {str(ALICES).partition(':')[2]}",  # its hash is no key
        "Bearer " + "x" * 10_000,
        "Bearer \xff\xfe",
    ],
)
def test_what_is_no_key_is_refused(client: TestClient, header: str) -> None:
    answer = client.post("/v1/generate", json={"inputs": "a"}, headers=[(b"authorization", header.encode("latin-1"))])
    message = refusal(answer, 401, "unauthorized")
    assert ALICE not in message
    twice = [(b"authorization", f"Bearer {ALICE}".encode())] * 2
    assert client.get("/v1/models", headers=twice).status_code == 401


def test_a_key_lets_in_and_its_scheme_has_any_case(client: TestClient) -> None:
    for key in (ALICE, BOB):
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = client.post("/v1/generate", json={"inputs": "a"}, headers={"Authorization": f"{scheme} {key}"})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"inputs": "a"}),
        ("/v1/generate", {"inputs": "a", "stream": True}),
        ("/v1/encode", {"inputs": "a"}),
        ("/v1/score", {"inputs": "a", "targets": "b"}),
        ("/v1/classify", {"inputs": "a"}),
    ],
)
def test_the_engine_is_told_whose_a_sequence_is(file: Path, path: str, body: dict[str, Any]) -> None:
    """For a fair share. Without keys nobody is told apart."""
    engine = FakeEngine()
    with TestClient(create_app(fake_models(engine, api_key_file=str(file)))) as client:
        assert client.post(path, json=body, headers=bearer(BOB)).status_code == 200
    with TestClient(create_app(fake_models(engine))) as client:
        assert client.post(path, json=body, headers=bearer(BOB)).status_code == 200
    assert [sequence.client for sequence in engine.received] == ["bob", ""]


def test_metrics_may_be_open(file: Path) -> None:
    app = create_app(fake_models(api_key_file=str(file), metrics_without_key=True))
    with TestClient(app) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_without_keys_everyone_is_let_in() -> None:
    with TestClient(create_app(fake_models())) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers=bearer("whatever")).status_code == 200


def test_keys_of_setting_and_file_are_both_let_in(file: Path) -> None:
    file.write_text(str(ALICES))
    keys = Keys(f" {BOBS}, {make_key('carol')[1]},", str(file))
    assert keys.client(ALICE.encode()) == "alice"
    assert keys.client(BOB.encode()) == "bob"
    assert keys.client(b"") is None
    assert len(keys.entries) == 3


def test_a_changed_file_is_taken_without_a_restart(file: Path) -> None:
    """Also where the file is swapped for another, as Kubernetes does with a Secret."""
    clock = Clock()
    keys = Keys(path=str(file), clock=clock)
    assert keys.client(BOB.encode()) == "bob"
    carol, carols = make_key("carol")
    other = file.with_name("other")
    other.write_text(f"{ALICES}\n{carols}\n")
    os.replace(other, file)
    clock.now = 0.5
    assert keys.client(carol.encode()) is None, "looked at too soon: a look costs a system call"
    clock.now = 1.5
    assert keys.client(carol.encode()) == "carol"
    assert keys.client(BOB.encode()) is None
    assert keys.client(ALICE.encode()) == "alice"


@pytest.mark.parametrize("text", ["", "# nobody\n", "alice:tooshort", None])
def test_a_file_that_breaks_changes_nothing_and_is_told_once(
    file: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = Keys(path=str(file), clock=clock)
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    for clock.now in (2.0, 4.0, 6.0):
        assert keys.client(ALICE.encode()) == "alice"
        assert keys.client(b"x") is None
        assert keys.required
    assert sum("the keys stay as they were" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no key in it"),
        (ALICE, "line 1 is not NAME:SHA-256"),
        (f"{ALICES}\nbob:{BOB}", "line 2 is not NAME:SHA-256"),
        (f"two words:{'a' * 64}", "line 1 is not"),
        (None, "No such file"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_wrong_file_ends_the_start_and_is_not_repeated(tmp_path: Path, text: Any, message: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=message) as caught:
        create_app(fake_models(api_key_file=str(path)))
    assert ALICE not in str(caught.value)
    assert BOB not in str(caught.value)
    with pytest.raises(SettingsError, match="--api-keys: entry 1") as caught:
        Keys(ALICE)
    assert ALICE not in str(caught.value)


def test_no_key_is_written_down(client: TestClient, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not in a log line, a metric, an answer or what the start tells; the client's name is."""
    caplog.set_level(logging.DEBUG)
    stranger = "td-canary-of-a-stranger"
    said = [
        client.post("/v1/generate", json={"inputs": "a"}, headers=bearer(ALICE)),
        client.post("/v1/generate", json={"inputs": "a" * 500}, headers=bearer(ALICE)),
        client.post("/v1/generate", json={"inputs": "a"}, headers=bearer(stranger)),
        client.get(f"/{stranger}", headers=bearer(ALICE)),
        client.get("/metrics", headers=bearer(ALICE)),
    ]
    settings = Settings(api_key_file=str(file), api_keys=str(BOBS))
    _announce(settings, Keys(settings.api_keys, settings.api_key_file), "127.0.0.1", 8000)
    ours = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    told = ours + "".join(answer.text + str(answer.headers) for answer in said)
    for secret in (ALICE, BOB, stranger, str(BOBS).partition(":")[2]):
        assert secret not in told
    assert "client=alice" in ours
    assert "api_keys=set" in ours
    assert "3 keys are let in" in ours
    failures = [line for line in said[-1].text.splitlines() if 'type="unauthorized"' in line]
    assert failures
    assert failures[0].endswith(" 1.0")


def test_every_entry_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a comparison that takes the same time for all: neither the place of a key nor a beginning shows."""
    compared: list[bytes] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append(ours)
        return ours == theirs

    monkeypatch.setattr("service.keys.hmac.compare_digest", compare)
    entries = [Entry(name, hashlib.sha256(name.encode()).digest()) for name in "abc"]
    keys = Keys(",".join(map(str, entries)))
    assert keys.client(b"a") == "a"
    assert keys.client(b"nobody") is None
    assert compared == [entry.digest for entry in entries] * 2
