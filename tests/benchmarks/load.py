"""What a server under load has to hold besides speed: the very answers of a text alone, and bounded memory.

    python -m tests.benchmarks.load exactness [--clients 64] [--requests 2000] [--options ...]
    python -m tests.benchmarks.load memory [--options ...]
    python -m tests.benchmarks.load sentences [--requests 2000]

The first two start `transduce serve` (with the options) on a free port of the loopback; the last one prints the texts
that they send, for `transduce bench --data`, which measures speed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from service.bench.target import Target

_WHO = ["I", "You", "My sister", "The old man next door", "Tom", "Nobody in this town"]
_DOES = ["would like to see", "has never heard of", "is looking for", "bought", "forgot", "cannot afford"]
_WHAT = ["the train station", "a cup of coffee", "that book", "an umbrella", "a new car", "the way to the hospital"]
_WHEN = ["", " today", " last week", " because it was raining", " when the children came home from school"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different English texts of one to five sentences, mostly one: the same for a seed."""
    rng = random.Random(seed)
    every = [f"{a} {b} {c}{d}." for a, b, c, d in itertools.product(_WHO, _DOES, _WHAT, _WHEN)]
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.sample(every, rng.choices([1, 2, 3, 5], [12, 4, 2, 1])[0]))] = None
    return list(texts)


@contextlib.contextmanager
def served(*options: str, ready_within: float = 60.0) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server on a free port of the loopback, ready; ended by SIGTERM if it still runs afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "import sys; from service.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", "--port", str(port), "--log-level", "warning", *options]
    server = subprocess.Popen(command)
    try:
        give_up = time.monotonic() + ready_within
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"the server did not become ready (exit status {server.poll()})") from None
                time.sleep(0.1)
        yield port, server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


@dataclass(frozen=True)
class Outcome:
    """What the clients saw."""

    seconds: float
    texts: dict[str, set[str]]
    """Every answer that a text got."""
    failures: list[str]


async def drive(port: int, texts: list[str], clients: int) -> Outcome:
    """Send every text once, by so many clients at a time."""
    line = iter(texts)
    answers: dict[str, set[str]] = {}
    failures: list[str] = []
    began = time.perf_counter()
    async with Target(f"http://127.0.0.1:{port}") as target:

        async def run_client() -> None:
            for text in line:
                reply, answer = await target.generate([text])
                if reply.failure is None:
                    answers.setdefault(text, set()).add(answer["outputs"][0]["sequences"][0]["text"])
                else:
                    failures.append(reply.failure)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(run_client())
    return Outcome(time.perf_counter() - began, answers, failures)


def metric(port: int, name: str) -> float:
    """The sum of a metric's samples, labels aside."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{| )", line))


def resident_mebibytes(server: subprocess.Popen[bytes]) -> float:
    """Resident memory of the server."""
    return psutil.Process(server.pid).memory_info().rss / 2**20


def measure_exactness(clients: int, requests: int, options: list[str]) -> None:
    """How many texts get another answer among those of other clients than they get alone."""
    texts = sentences(requests)
    with served(*options) as (port, _):
        alone = asyncio.run(drive(port, texts, 1))
        together = asyncio.run(drive(port, random.Random(1).sample(texts, len(texts)), clients))
    other = sum(together.texts[text] != alone.texts[text] for text in together.texts)
    failures = len(alone.failures) + len(together.failures)
    print(f"{other} of {len(together.texts)} texts differ with {clients} clients, {failures} failures")


def measure_memory(options: list[str]) -> None:
    """Resident memory after 1,000 and after 10,000 requests of mixed length."""
    texts = sentences(10000, seed=2)
    with served(*options) as (port, server):
        for part in (texts[:1000], texts[1000:]):
            outcome = asyncio.run(drive(port, part, 64))
            resident = resident_mebibytes(server)
            print(f"{resident:.0f} MiB after {len(part)} more requests, {len(outcome.failures)} failures")


def main() -> None:
    """The commands in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("exactness", "memory", "sentences"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to `transduce serve`")
    arguments = parser.parse_args()
    if arguments.what == "exactness":
        measure_exactness(arguments.clients, arguments.requests, arguments.options)
    elif arguments.what == "memory":
        measure_memory(arguments.options)
    else:
        print("\n".join(sentences(arguments.requests)))


if __name__ == "__main__":
    main()
