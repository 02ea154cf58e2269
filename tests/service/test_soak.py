"""A long time of everything at once: what a server holds at its end is what it held at its beginning.

A minute by default, `SOAK_SECONDS=1800 make test-slow ARGS='-k soak -s'` for more; with -s there is a line every 30 s.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.keys import make_key
from service.settings import DEFAULT_MODEL

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
WARM_UP_SECONDS = min(120.0, SECONDS / 2)
"""What is held is measured from then on: buffers and the allocator's own have reached their sizes."""

CLIENTS = 8
GROWTH = 50e6
"""Bytes of resident memory that may come to what there was."""

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "train",
    "sees",
    "likes",
    "old",
    "little",
    "red",
    "and",
    "but",
    "where",
    "is",
)
KNOWN = ["Where is the train station?", "Good morning!", "It is raining."]
ADMIN, ADMIN_ENTRY = make_key("operator")


@contextmanager
def server(model: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The program on a free port."""
    flags = ["--model", f"en-de={model}", "--port", "0", "--admin-keys", str(ADMIN_ENTRY)]
    program = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", *flags], stderr=subprocess.PIPE, text=True
    )
    assert program.stderr is not None
    url = ""
    for line in program.stderr:
        if found := re.search(r"listening on (\S+) ", line):
            url = found[1]
        if line.rstrip().endswith(" ready"):
            break
    unread = threading.Thread(target=program.stderr.read)
    unread.start()
    try:
        yield url, psutil.Process(program.pid)
    finally:
        program.terminate()
        status = program.wait(60)
        unread.join()
        program.stderr.close()
    assert status == 0


class Client:
    """Asks for anything, in any manner, and keeps count of what it sent and what it got."""

    def __init__(self, url: str, seed: int, over: threading.Event, known: dict[str, str]) -> None:
        self.url, self.rng, self.over, self.known = url, random.Random(seed), over, known
        self.count: Counter[str] = Counter()
        self.trouble: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.over.is_set():
                manner = self.rng.choices((self.plain, self.stream, self.leave, self.bad, self.exact), (6, 3, 2, 2, 1))[
                    0
                ]
                try:
                    manner(http)
                except Exception as error:
                    self.trouble.append(f"{manner.__name__}: {type(error).__name__} {error}")
                    return
                time.sleep(self.rng.random() / 10)

    def body(self) -> tuple[str, dict[str, Any]]:
        texts = [
            " ".join(self.rng.choices(WORDS, k=int(self.rng.paretovariate(1.0)) % 300 + 1))
            for _ in range(self.rng.choice((1, 1, 1, 2, 8)))
        ]
        route = self.rng.choices(("generate", "encode", "score"), (6, 2, 1))[0]
        body: dict[str, Any] = {"inputs": texts}
        if route == "score":
            body["targets"] = texts
        if route == "generate":
            body["parameters"] = self.rng.choice(
                (
                    {}, {}, {"num_beams": 4}, {"num_beams": 2, "num_return_sequences": 2}, {"max_new_tokens": 5},
                    {"do_sample": True, "seed": 3}, {"timeout": 0.05}, {"repetition_penalty": 1.2},
                )
            )  # fmt: skip
        return route, body

    def plain(self, http: httpx.Client) -> None:
        """An ordinary request."""
        route, body = self.body()
        response = http.post(f"/v1/{route}", json=body)
        self.took(response.status_code, len(body["inputs"]))

    def stream(self, http: httpx.Client) -> None:
        """The same as it is being made."""
        _, body = self.body()
        body = {"inputs": body["inputs"], "stream": True}
        with http.stream("POST", "/v1/generate", json=body) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        if response.status_code == 200:
            assert lines[-1] == "data: [DONE]"
        self.took(response.status_code, len(body["inputs"]))

    def leave(self, http: httpx.Client) -> None:
        """Gone before the answer is there, in the middle of a stream or in line."""
        _, body = self.body()
        body = {"inputs": body["inputs"] * 4, "stream": self.rng.random() < 0.5, "parameters": {"num_beams": 1}}
        self.count["left"] += len(body["inputs"])
        impatient = httpx.Timeout(20, read=0.02)
        url = f"{self.url}/v1/generate"
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=impatient) as response:
            next(response.iter_lines())

    def bad(self, http: httpx.Client) -> None:
        """What is refused: no JSON, no such field, too long, no such route."""
        request: dict[str, Any] = self.rng.choice(
            (
                {"content": b"{"}, {"json": {"inputs": "a", "no": 1}}, {"json": {"inputs": "word " * 5000}},
                {"json": {"inputs": ["a"] * 2000}}, {"json": {"inputs": "a", "model": "none"}},
                {"json": {"inputs": "a", "parameters": {"num_beams": 1000}}}, {"content": b"[" * 100_000},
            )
        )  # fmt: skip
        response = http.post("/v1/generate", **request)
        assert response.status_code in (400, 404, 413, 422), response.text
        self.count["bad"] += 1

    def exact(self, http: httpx.Client) -> None:
        """A text whose answer is known, among the others' whatever they are."""
        texts = self.rng.sample(KNOWN, 2)
        response = http.post("/v1/generate", json={"inputs": texts})
        assert response.status_code == 200
        said = [output["sequences"][0]["text"] for output in response.json()["outputs"]]
        assert said == [self.known[text] for text in texts]
        self.took(200, 2)

    def took(self, status: int, inputs: int) -> None:
        assert status in (200, 413, 504), status
        if status == 413:
            self.count["bad"] += 1
        else:
            self.count["answered" if status == 200 else "late"] += inputs


def held(process: psutil.Process) -> dict[str, float]:
    return {"resident": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds()}


def metrics(url: str) -> list[Sample]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return [sample for family in families for sample in family.samples]


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_nothing_grows_and_every_request_is_accounted_for(tmp_path: Path) -> None:
    """Random lengths and parameters, streams, clients that leave, bad input, new versions of the model."""
    for version in ("1", "2"):
        shutil.copytree(DEFAULT_MODEL, tmp_path / version)
    with server(tmp_path / "1") as (url, process):
        said = httpx.post(f"{url}/v1/generate", json={"inputs": KNOWN}).json()["outputs"]
        known = {text: output["sequences"][0]["text"] for text, output in zip(KNOWN, said, strict=True)}
        over = threading.Event()
        clients = [Client(url, seed, over, known) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        samples: list[dict[str, float]] = []
        versions = 0
        try:
            while (passed := time.monotonic() - began) < SECONDS and not any(client.trouble for client in clients):
                time.sleep(min(27.0, SECONDS / 12))
                headers, body = {"Authorization": f"Bearer {ADMIN}"}, {"path": "12"[versions % 2]}
                response = httpx.post(f"{url}/admin/models/en-de", json=body, headers=headers, timeout=60)
                assert response.status_code == 200, response.text
                versions += 1
                time.sleep(3)  # until the version before is gone
                now = held(process)
                if passed >= WARM_UP_SECONDS:
                    samples.append(now)
                sys.stdout.write(f"{passed:6.0f} s {json.dumps(now)}\n")
                sys.stdout.flush()
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert not [client.trouble for client in clients if client.trouble]
        time.sleep(1)
        told = metrics(url)
        count = sum((client.count for client in clients), Counter())
        some = max(1, len(samples) // 4)  # what is under way differs from one look to the next
        beginning, end = (
            {name: statistics.median(sample[name] for sample in part) for name in samples[0]}
            for part in (samples[:some], samples[-some:])
        )
        sys.stdout.write(json.dumps({"count": count, "versions": versions, "beginning": beginning, "end": end}) + "\n")
        assert end["resident"] - beginning["resident"] < GROWTH
        assert end["threads"] <= beginning["threads"] + 2
        assert end["files"] <= beginning["files"] + 4
        for name in ("num_requests_running", "num_requests_waiting", "num_tokens_waiting", "rows_in_use"):
            assert [sample.value for sample in told if sample.name == f"transduce_{name}"] == [0], name
        assert [sample.value for sample in told if sample.name == "transduce_rows_capacity"] == [64]
        ended: Counter[str] = Counter()
        for sample in told:
            if sample.name == "transduce_requests_total":
                ended[sample.labels["finish_reason"]] += int(sample.value)
        ended["stop"] -= len(KNOWN)
        answered = ended["stop"] + ended["length"] + ended["timeout"]
        assert ended["error"] == 0
        # Who left may have been answered in the same moment; and what is late in line takes its call's others along.
        assert count["answered"] <= answered <= count["answered"] + count["left"] + count["late"]
        assert answered + ended["cancelled"] <= count["answered"] + count["left"] + count["late"]
        assert count["answered"] > 0
        assert count["left"] > 0
