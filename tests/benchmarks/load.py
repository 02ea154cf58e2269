"""Closed-loop load on a running server: N clients, each sending its next request when the last is answered.

    python -m tests.benchmarks.load --clients 1 8 64 --requests 2000

starts `transduce serve` on a free port of the loopback, checks every answer against the one that the same text gets
alone, and prints a line per number of clients: requests and tokens a second, latency, rows a step, resident memory.
The clients share the machine's processors with the server, so the figures are a lower bound. With --memory it prints
the server's resident memory after 1,000 and after 10,000 requests of 64 clients instead.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
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


class Client:
    """One connection that is kept: as little Python per request as can be, since it runs beside the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def generate(self, text: str) -> tuple[int, dict]:
        """Status and body of POST /v1/generate."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = json.dumps({"inputs": text}).encode()
        writer.write(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None, head
        answer = json.loads(await reader.readexactly(int(length[1])))
        return int(head[9:12]), answer

    async def close(self) -> None:
        """End the connection."""
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()


@dataclass(frozen=True)
class Outcome:
    """What the clients saw."""

    clients: int
    seconds: float
    latencies: list[float]
    tokens: int
    texts: dict[str, set[str]]
    """Every answer that a text got."""
    failures: list[tuple[int, dict]]

    def percentile(self, share: float) -> float:
        """Latency that this share of the requests did not exceed, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def drive(port: int, texts: list[str], clients: int) -> Outcome:
    """Send every text once, by so many clients at a time."""
    line = iter(texts)
    latencies: list[float] = []
    answers: dict[str, set[str]] = {}
    failures: list[tuple[int, dict]] = []
    tokens = 0

    async def run_client() -> None:
        nonlocal tokens
        client = Client(port)
        for text in line:
            began = time.perf_counter()
            status, answer = await client.generate(text)
            latencies.append(time.perf_counter() - began)
            if status == 200:
                answers.setdefault(text, set()).add(answer["outputs"][0]["sequences"][0]["text"])
                tokens += answer["usage"]["generated_tokens"]
            else:
                failures.append((status, answer))
        await client.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(run_client())
    return Outcome(clients, time.perf_counter() - began, latencies, tokens, answers, failures)


def metric(port: int, name: str) -> float:
    """The sum of a metric's samples, labels aside."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{| )", line))


def resident_mebibytes(server: subprocess.Popen[bytes]) -> float:
    """Resident memory of the server."""
    return psutil.Process(server.pid).memory_info().rss / 2**20


def measure_memory(options: list[str]) -> None:
    """Resident memory after 1,000 and after 10,000 requests of mixed length."""
    texts = sentences(10000, seed=2)
    with served(*options) as (port, server):
        for part in (texts[:1000], texts[1000:]):
            outcome = asyncio.run(drive(port, part, 64))
            resident = resident_mebibytes(server)
            print(f"{resident:.0f} MiB after {len(part)} more requests, {len(outcome.failures)} failures")


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=2000, help="of each number of clients (of one client: a tenth)")
    parser.add_argument("--rounds", type=int, default=3, help="how often all numbers of clients take their turn")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to `transduce serve`")
    parser.add_argument("--memory", action="store_true", help="measure resident memory instead")
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.options)
        return
    with served(*arguments.options) as (port, server):
        texts = sentences(arguments.requests)
        alone = asyncio.run(drive(port, texts, 1)).texts
        print("clients  requests/s  tokens/s  p50 ms  p99 ms  rows/step  other than alone  failures  resident MiB")
        for number in range(arguments.rounds):
            for clients in arguments.clients:
                load = texts if clients > 1 else texts[: max(1, len(texts) // 10)]
                steps, rows = metric(port, "transduce_batch_rows_count"), metric(port, "transduce_batch_rows_sum")
                outcome = asyncio.run(drive(port, random.Random(number).sample(load, len(load)), clients))
                steps = metric(port, "transduce_batch_rows_count") - steps
                rows = metric(port, "transduce_batch_rows_sum") - rows
                other = sum(outcome.texts[text] != alone[text] for text in outcome.texts)
                rates = len(outcome.latencies) / outcome.seconds, outcome.tokens / outcome.seconds
                latency = outcome.percentile(0.5) * 1e3, outcome.percentile(0.99) * 1e3
                print(
                    f"{clients:7d}  {rates[0]:10.1f}  {rates[1]:8.0f}  {latency[0]:6.1f}  {latency[1]:6.1f}"
                    f"  {rows / steps:9.1f}  {other:16d}  {len(outcome.failures):8d}"
                    f"  {resident_mebibytes(server):12.0f}"
                )


if __name__ == "__main__":
    main()
