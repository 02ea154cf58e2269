"""Servers under the same load: `transduce serve`, and CTranslate2 behind micro-batching, in alternating rounds.

Both run all the time, and who is not measured has nothing to do. The load is `transduce bench`'s: a closed loop of
many clients, one client alone, and an open loop at a share of what CTranslate2's server can take. Clients and servers
share the machine's processors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from service.bench.load import measure
from service.bench.report import Point
from service.bench.target import Target
from service.bench.workload import Clients, Load, Rate, Workload
from tests.benchmarks.offline import PINNED
from tests.benchmarks.workload import Subject

WINDOWS_MS = (0.0, 2.0, 5.0, 10.0, 20.0)
BATCHES = (16, 32, 64)
CLIENTS = 64
OFFERED = 0.7
"""Of the requests a second that CTranslate2's server answers to many clients."""


@dataclass(frozen=True)
class Server:
    """How a server is started."""

    name: str
    way: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self, ready_within: float = 120.0) -> Iterator[str]:
        """Its address, once it is ready; it is ended afterwards."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, *self.command, "--port", str(port)], env=os.environ | self.environment
        )
        try:
            give_up = time.monotonic() + ready_within
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{self.name} did not become ready (exit status {process.poll()})")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def transduce(subject: Subject, options: Sequence[str] = ()) -> Server:
    """`transduce serve` with its defaults."""
    program = "import sys; from service.cli import main; sys.exit(main())"
    command = ["-c", program, "serve", "--model", str(subject.artifact), "--log-level", "warning", *options]
    return Server("transduce", " ".join(options) or "as installed", command)


def ctranslate2(
    subject: Subject, window_ms: float, batch: int, replicas: int, intra_threads: int, environment: dict[str, str]
) -> Server:
    """CTranslate2's, with this window and this batch."""
    options = [
        *("--window-ms", str(window_ms), "--batch", str(batch)),
        *("--replicas", str(replicas), "--intra-threads", str(intra_threads)),
        *(() if subject.length is None else ("--max-tokens", str(subject.length))),
    ]
    command = [
        *("-m", "tests.benchmarks.ctranslate2_server", str(subject.ctranslate2), str(subject.tokenizer_file)),
        *options,
    ]
    way = f"window {window_ms:g} ms, batches of {batch}, {replicas}x{intra_threads} threads"
    pinned = PINNED if intra_threads > 1 else {}
    return Server("ctranslate2", way, command, {**environment, **pinned})


def _ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def load(address: str, subject: Subject, under: Load, seconds: float, seed: int, **parameters: Any) -> Point:
    """What a server does under this load for so long."""

    async def run() -> Point:
        async with Target(address, parameters=parameters) as target:
            return await measure(target, under, Workload(texts=subject.texts, duration=seconds, seed=seed))

    return uvloop.run(run())


def best_for_many(subject: Subject, processors: int, environment: dict[str, str], seconds: float) -> Server:
    """CTranslate2's server with the window and batch that answer most of `CLIENTS` clients."""
    rates: list[tuple[float, Server]] = []
    tried = [
        ctranslate2(subject, window, batch, processors, 1, environment) for window in WINDOWS_MS for batch in BATCHES
    ]
    tried += [ctranslate2(subject, 0.0, 64, 1, processors, environment)]
    for server in tried:
        with server.running() as address:
            point = load(address, subject, Clients(CLIENTS), seconds, 0)
        rates.append((point.requests_per_second, server))
        print(f"    {subject.name}, {server.way}: {point.requests_per_second:.0f} requests/s", flush=True)
    return max(rates, key=lambda pair: pair[0])[1]


def best_for_one(subject: Subject, processors: int, environment: dict[str, str], seconds: float) -> Server:
    """CTranslate2's server with the threads that answer one client soonest."""
    latencies: list[tuple[float, Server]] = []
    for threads in sorted({1, processors}):
        server = ctranslate2(subject, 0.0, 64, 1, threads, environment)
        with server.running() as address:
            point = load(address, subject, Clients(1), seconds, 0)
        assert point.latency is not None
        latencies.append((point.latency.p50, server))
        print(f"    {subject.name}, {server.way}: {point.latency.p50 * 1e3:.1f} ms alone", flush=True)
    return min(latencies, key=lambda pair: pair[0])[1]


@dataclass
class Served:
    """Points of each round under each load, by server: "many", "one" and "offered"."""

    subject: str
    ways: dict[str, str]
    rate: float = 0.0
    """Requests a second that were offered."""
    points: dict[str, dict[str, list[Point]]] = field(default_factory=dict)

    def values(self, under: str, server: str, of: str) -> list[float]:
        """A figure of each round: tokens (a second), requests (a second), or a percentile of the latency."""
        figures = []
        for point in self.points[under][server]:
            if of in ("tokens", "requests"):
                figures.append(getattr(point, f"{of}_per_second"))
            else:
                assert point.latency is not None
                figures.append(getattr(point.latency, of))
        return figures

    def ratios(self, under: str, of: str) -> list[float]:
        """Transduce over CTranslate2, round by round."""
        pairs = zip(self.values(under, "transduce", of), self.values(under, "ctranslate2", of), strict=True)
        return [ours / theirs for ours, theirs in pairs]


def compare(
    subject: Subject, rounds: int, processors: int, environment: dict[str, str], seconds: float, sweep_seconds: float
) -> Served:
    """Sweep CTranslate2's server, then measure both in alternating rounds."""
    many = best_for_many(subject, processors, environment, sweep_seconds)
    one = best_for_one(subject, processors, environment, sweep_seconds)
    ours = transduce(subject)
    found = Served(subject.name, {"transduce": ours.way, "ctranslate2": many.way, "ctranslate2 alone": one.way})
    with ours.running() as our_address, many.running() as many_address, one.running() as one_address:
        addresses = {
            "many": {"transduce": our_address, "ctranslate2": many_address},
            "offered": {"transduce": our_address, "ctranslate2": many_address},
            "one": {"transduce": our_address, "ctranslate2": one_address},
        }
        for under, servers in addresses.items():
            found.points[under] = {server: [] for server in servers}
        for under, servers in addresses.items():
            if under == "offered":
                found.rate = OFFERED * statistics.median(found.values("many", "ctranslate2", "requests"))
            how: Load = {"many": Clients(CLIENTS), "one": Clients(1), "offered": Rate(found.rate or 1.0)}[under]
            for number in range(rounds):
                turns = list(servers.items())
                for server, address in turns if number % 2 else turns[::-1]:
                    point = load(address, subject, how, seconds, number)
                    if point.failed:
                        print(f"    {server} failed: {point.failures}", flush=True)
                    found.points[under][server].append(point)
            print_load(found, under, str(how))
    return found


def print_load(served: Served, under: str, how: str) -> None:
    """A line for each server."""
    for server, points in served.points[under].items():
        middle = {of: statistics.median(served.values(under, server, of)) for of in ("tokens", "p50", "p95", "p99")}
        print(
            f"  {served.subject}, {how}, {server}: {middle['tokens']:,.0f} tokens/s, latency p50 "
            f"{middle['p50'] * 1e3:.1f}, p95 {middle['p95'] * 1e3:.1f}, p99 {middle['p99'] * 1e3:.1f} ms "
            f"(medians of {len(points)})",
            flush=True,
        )
