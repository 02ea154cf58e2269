"""Several models in one process, each with versions that take each other's place while requests come."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from service.errors import SettingsError
from service.keys import make_key
from service.models import Models, load_all
from service.settings import Settings
from tests.service.fake_engine import FakeEngine, fake_model
from tests.service.fake_server import serving
from tests.service.real_model import TEXTS

PATIENCE = 60.0

ADMIN, ADMIN_ENTRY = make_key("operator")
CLIENT, CLIENT_ENTRY = make_key("client")


@pytest.fixture
def versions(tmp_path: Path, tiny_artifact: Path, tiny_fp32_artifact: Path, tiny_post_norm_artifact: Path) -> Path:
    """A directory of versions: 1 and 2 give other answers; of the others each is bad in its own way."""
    place = tmp_path / "versions"
    for name, artifact in (("1", tiny_post_norm_artifact), ("2", tiny_fp32_artifact), ("int8", tiny_artifact)):
        shutil.copytree(artifact, place / name)
        _edit(place / name, version=name)
    shutil.copytree(place / "2", place / "changed")
    manifest = json.loads((place / "changed" / "manifest.json").read_text())
    (place / "changed" / manifest["variants"]["cpu"]["decoder"]).write_bytes(b"something else")
    shutil.copytree(place / "2", place / "wrong")
    manifest = json.loads((place / "wrong" / "manifest.json").read_text())
    manifest["self_test"][0]["target_ids"]["cpu"][0] ^= 1
    (place / "wrong" / "manifest.json").write_text(json.dumps(manifest))
    (place / "empty").mkdir()
    (place / "outside").symlink_to(tiny_artifact)
    return place


def _edit(artifact: Path, **changes: Any) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Server:
    """A running server, and what an operator and a client say to it."""

    def __init__(self, models: Models, port: int) -> None:
        self.models = models
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def replace(self, name: str, body: Any, key: str = ADMIN) -> httpx.Response:
        return self.http.post(f"/admin/models/{name}", json=body, headers={"Authorization": f"Bearer {key}"})

    def answers(self, model: str | None = None) -> list[str]:
        body = {"inputs": TEXTS} | ({"model": model} if model else {})
        response = self.http.post("/v1/generate", json=body)
        assert response.status_code == 200, response.text
        return [output["sequences"][0]["text"] for output in response.json()["outputs"]]

    def metric(self, line: str) -> float | None:
        """The value of a sample, by the beginning of its line."""
        found = [text for text in self.http.get("/metrics").text.splitlines() if text.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else None


@contextmanager
def server(model: str, **settings: Any) -> Iterator[Server]:
    logging.getLogger("transduce").setLevel(logging.INFO)
    settings = {"admin_keys": str(ADMIN_ENTRY), "workers": 2, "max_rows": 8, **settings}
    models = load_all(Settings(model=model, provider="cpu", threads=1, **settings))
    models.start()
    try:
        asyncio.run(models.wait_ready())
        with serving(models) as port:
            running = Server(models, port)
            with running.http:
                yield running
    finally:
        asyncio.run(models.stop())


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# ---- several models ----


def test_a_request_names_its_model_and_the_first_answers_those_that_name_none(versions: Path) -> None:
    """Each has its own answers, its own card and its own metrics."""
    with server(f"old={versions / '1'},new={versions / '2'}") as both:
        old, new = both.answers("old"), both.answers("new")
        assert old != new
        assert both.answers() == old
        cards = both.http.get("/v1/models").json()["data"]
        assert [(card["id"], card["version"]) for card in cards] == [("old", "1"), ("new", "2")]
        unknown = both.http.post("/v1/encode", json={"inputs": "a", "model": "other"})
        assert unknown.status_code == 404
        assert "'old', 'new'" in unknown.json()["error"]["message"]
        for name, count in (("old", 2), ("new", 1)):
            ended = f'transduce_requests_total{{endpoint="generate",finish_reason="length",model_name="{name}"}}'
            assert both.metric(ended.replace("length", "stop")) or both.metric(ended)
            http = f'transduce_http_requests_total{{endpoint="/v1/generate",model_name="{name}",status="200"}}'
            assert both.metric(http) == count
            assert both.metric(f'transduce_ready{{model_name="{name}"}}') == 1
            assert both.metric(f'transduce_rows_capacity{{model_name="{name}"}}') == 8
        with server(str(versions / "1")) as alone:
            assert alone.answers() == old


def test_two_models_of_one_name_are_refused(versions: Path) -> None:
    """With the remedy."""
    with pytest.raises(SettingsError, match="NAME=PATH"):
        load_all(Settings(model=f"{versions / '1'},{versions / '2'}"))


def test_one_busy_model_does_not_refuse_what_is_meant_for_another() -> None:
    """Before the body is read nobody knows whom it is for: only if all are full it is refused there."""
    full, free = FakeEngine(room=0), FakeEngine()
    first, second = fake_model(full, max_queue=4), fake_model(free, max_queue=4)
    second.artifact.name = "free"
    models = Models([first, second])
    with serving(models) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post("/v1/generate", json={"inputs": "a", "model": "free"}).status_code == 200
        assert client.post("/v1/generate", json={"inputs": "a"}).status_code == 429
        full.status = "starting"
        assert client.post("/v1/generate", json={"inputs": "a", "model": "free"}).status_code == 200
        assert client.post("/v1/generate", json={"inputs": "a"}).status_code == 503
        assert client.get("/readyz").status_code == 503


# ---- versions ----


def test_versions_take_each_others_place_without_a_lost_request(versions: Path) -> None:
    """Clients that never pause see 200 alone, each answer whole from one version or the other; then the new one's."""
    with server(f"tiny={versions / '1'}") as running:
        of_version = {"1": running.answers()}
        assert running.replace("tiny", {"path": "2"}).status_code == 200
        of_version["2"] = running.answers()
        assert of_version["1"] != of_version["2"]
        over, seen, wrong = threading.Event(), [], []

        def ask(number: int) -> None:
            with httpx.Client(base_url=running.url, timeout=PATIENCE) as client:
                while not over.is_set():
                    body = {"inputs": TEXTS, "stream": number == 0}
                    response = client.post("/v1/generate", json=body)
                    if response.status_code != 200:
                        wrong.append(response.text)
                        return
                    if number == 0:
                        texts = [""] * len(TEXTS)
                        for line in response.text.splitlines():
                            if line.startswith("data: {"):
                                event = json.loads(line.removeprefix("data: "))
                                texts[event["index"]] += event["text"]
                    else:
                        texts = [output["sequences"][0]["text"] for output in response.json()["outputs"]]
                    seen.append(next((version for version, answers in of_version.items() if answers == texts), "none"))

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for client in clients:
            client.start()
        try:
            for version in ("1", "2", "1", "1", "2", "1"):
                response = running.replace("tiny", {"path": version})
                assert (response.status_code, response.json()["version"]) == (200, version)
                count = len(seen)
                wait_for(lambda count=count: len(seen) > count + 8 or bool(wrong))
        finally:
            over.set()
            for client in clients:
                client.join()
        assert not wrong
        assert set(seen) == {"1", "2"}
        assert running.answers() == of_version["1"]
        wait_for(lambda: not running.models._leaving)
        assert sum(thread.name.startswith("worker ") for thread in threading.enumerate()) == 2
        assert running.metric('transduce_rows_capacity{model_name="tiny"}') == 8
        assert running.metric('transduce_num_requests_running{model_name="tiny"}') == 0
        assert running.metric('transduce_model_loads_total{model_name="tiny",outcome="served"}') == 8
        assert running.metric('transduce_model_info{model_name="tiny",version="1"}') == 1
        assert running.metric('transduce_model_info{model_name="tiny",version="2"}') is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("changed", "SHA-256"),
        ("wrong", "self-test 0"),
        ("empty", "manifest.json"),
        ("nowhere", "nowhere"),
        ("../../etc", "leads out of"),
        ("/etc", "leads out of"),
        ("outside", "leads out of"),
        ("", "path"),
        ("a\x00b", "path"),
    ],
)
def test_a_bad_version_is_refused_and_the_one_before_it_serves_on(versions: Path, path: str, reason: str) -> None:
    """422 with what is wrong; nothing else changes, and nothing is left behind."""
    with server(f"tiny={versions / '2'}") as running:
        answers = running.answers()
        threads = threading.active_count()
        response = running.replace("tiny", {"path": path})
        assert response.status_code == 422, response.text
        assert reason in response.json()["error"]["message"]
        assert running.answers() == answers
        assert running.http.get("/readyz").status_code == 200
        assert running.metric('transduce_rows_capacity{model_name="tiny"}') == 8
        assert running.metric('transduce_ready{model_name="tiny"}') == 1
        assert threading.active_count() <= threads + 6  # asyncio's own, which stay
        assert sum(thread.name in ("engine", "worker 0") for thread in threading.enumerate()) == 1


def test_the_same_directory_is_read_anew(versions: Path) -> None:
    """Without a path: whoever copies the new version over the old one."""
    with server(f"tiny={versions / '2'}") as running:
        _edit(versions / "2", version="2b")
        assert running.replace("tiny", {}).json()["version"] == "2b"


def test_one_version_is_loaded_at_a_time(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """409 for the second; while it loads requests are answered."""
    with server(f"tiny={versions / '1'}") as running:
        may_load, loading = threading.Event(), threading.Event()
        load = running.models._load_version

        def slowly(name: str, path: Path) -> Any:
            loading.set()
            assert may_load.wait(PATIENCE)
            assert load is not None
            return load(name, path)

        running.models._load_version = slowly
        first: list[httpx.Response] = []
        with httpx.Client(base_url=running.url, timeout=PATIENCE) as operator:
            asked = threading.Thread(
                target=lambda: first.append(
                    operator.post(
                        "/admin/models/tiny", json={"path": "2"}, headers={"Authorization": f"Bearer {ADMIN}"}
                    )
                )
            )
            asked.start()
            assert loading.wait(PATIENCE)
            second = running.replace("tiny", {"path": "2"})
            assert (second.status_code, second.json()["error"]["type"]) == (409, "conflict")
            assert running.http.get("/v1/models").json()["data"][0]["version"] == "1"
            running.answers()
            may_load.set()
            asked.join()
        assert first[0].json()["version"] == "2"


# ---- keys ----


def test_the_admin_route_is_not_there_without_a_key_for_it(versions: Path) -> None:
    """404, in the documentation neither."""
    with server(f"tiny={versions / '1'}", admin_keys="") as running:
        assert running.replace("tiny", {"path": "2"}).status_code == 404
        assert not [path for path in running.http.get("/openapi.json").json()["paths"] if "admin" in path]


def test_admin_keys_and_the_others_open_only_their_own(versions: Path) -> None:
    """A client cannot replace a model, an operator's key asks for no translation, unless both are let in."""
    with server(f"tiny={versions / '1'}", api_keys=str(CLIENT_ENTRY)) as running:
        for key in (CLIENT, "nobody's"):
            assert running.replace("tiny", {"path": "2"}, key).status_code == 401
        assert running.http.post("/admin/models/tiny", json={}).status_code == 401
        assert running.http.post("/admin/anything").status_code == 401
        body, headers = {"inputs": "a"}, {"Authorization": f"Bearer {ADMIN}"}
        assert running.http.post("/v1/generate", json=body, headers=headers).status_code == 401
        headers = {"Authorization": f"Bearer {CLIENT}"}
        assert running.http.post("/v1/generate", json=body, headers=headers).status_code == 200
        assert running.replace("tiny", {"path": "2"}).status_code == 200
        assert running.replace("other", {"path": "2"}).status_code == 404
        assert running.replace("tiny", {"paths": "2"}).status_code == 422
        assert "/admin/models/{name}" in running.http.get("/openapi.json", headers=headers).json()["paths"]
