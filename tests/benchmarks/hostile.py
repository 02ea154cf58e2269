"""What harmful clients cost the others: in turns a server without and with a crowd of them.

    python -m tests.benchmarks.hostile [silent refused anew leaves unread values] [--seconds 15] [--rounds 1]

It starts `transduce serve` with a key on all processors but the last, where the crowd is, four ordinary clients in a
closed loop, and a probe ten times a second. Each line has the ordinary clients' answers with the crowd over those
without, how long probes took, how many were not answered with 200, and the most memory that was in use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import psutil

from service.bench.target import Target
from service.keys import make_key
from tests.benchmarks.load import sentences, served

_FILES = 20_000


def _post(path: str, body: object, *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content


@dataclass
class Crowd:
    """Where the server is, and the header with its key; what was done."""

    port: int
    key: str
    done: int = 0
    kept: list[asyncio.StreamWriter] = field(default_factory=list)

    async def silent(self) -> None:
        """Six thousand connections that say nothing, made anew where they are closed; 4,096 may be open."""
        while True:
            await asyncio.sleep(0.001)
            self.kept.append((await self._connect())[1])
            self.done += 1
            if len(self.kept) > 6000:
                self.kept.pop(0).transport.abort()

    async def refused(self) -> None:
        """Two hundred without a key that ask again at once."""

        async def ask() -> None:
            while True:
                reader, writer = await self._connect()
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # closed: it comes again
                    while True:
                        writer.write(_post("/v1/generate", {"inputs": "a"}))
                        await self._answer(reader)
                writer.close()

        await self._together(200, ask)

    async def anew(self) -> None:
        """The same, on a new connection each time."""

        async def ask() -> None:
            while True:
                await self._once(_post("/v1/generate", {"inputs": "a"}))

        await self._together(16, ask)

    async def leaves(self) -> None:
        """A hundred a second that are let in, and leave at once."""
        while True:
            await asyncio.sleep(0.01)
            _, writer = await self._connect()
            writer.write(_post("/v1/generate", {"inputs": "A sentence of some length is here."}, self.key))
            await writer.drain()
            asyncio.get_running_loop().call_later(0.02, writer.close)
            self.done += 1

    async def unread(self) -> None:
        """Twelve that ask for 99 MB of vectors each, and do not read them."""
        text = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4
        for _ in range(12):
            _, writer = await self._connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # of every transport that reads
            writer.write(_post("/v1/encode", {"inputs": [text] * 270, "pooling": "none"}, self.key))
            self.kept.append(writer)
            self.done += 1
        await asyncio.Event().wait()

    async def values(self) -> None:
        """Twelve that send eight megabytes of empty objects, again and again."""
        request = _post("/v1/generate", b'{"inputs":[' + b",".join([b"{}"] * 2_790_000) + b"]}", self.key)

        async def ask() -> None:
            while True:
                await self._once(request)

        await self._together(12, ask)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self.port)
            await asyncio.sleep(0.01)

    async def _answer(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        self.done += 1

    async def _once(self, request: bytes) -> None:
        reader, writer = await self._connect()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            writer.write(request)
            await self._answer(reader)
        writer.close()

    async def _together(self, count: int, ask: Callable[[], Awaitable[None]]) -> None:
        await asyncio.gather(*(ask() for _ in range(count)))


CROWDS = ("silent", "refused", "anew", "leaves", "unread", "values")


def be_crowd(name: str, port: int, key: str, seconds: float) -> None:
    """In a process of its own: print how much was done."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    crowd = Crowd(port, f"Authorization: Bearer {key}")

    async def run() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await getattr(crowd, name)()

    asyncio.run(run())
    print(crowd.done)


@contextlib.contextmanager
def watched(port: int, server: subprocess.Popen[bytes]) -> Iterator[tuple[list[float], list[int], list[str]]]:
    """Seconds that each probe took, resident bytes, and what the probes were told that is not 200."""
    took, resident, wrong, over = [], [], [], threading.Event()
    process = psutil.Process(server.pid)

    def probe() -> None:
        while not over.wait(0.1):
            began = time.monotonic()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30).close()
            except (urllib.error.URLError, OSError) as error:
                wrong.append(str(error))
            took.append(time.monotonic() - began)

    def look() -> None:
        while not over.wait(0.02):
            resident.append(process.memory_info().rss)

    threads = [threading.Thread(target=probe), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    try:
        yield took, resident, wrong
    finally:
        over.set()
        for thread in threads:
            thread.join()


async def answers(port: int, key: str, seconds: float) -> int:
    """What four ordinary clients get in that time."""
    texts, end, count = sentences(1000), time.perf_counter() + seconds, 0
    async with Target(f"http://127.0.0.1:{port}", api_key=key) as target:

        async def run_client(first: int) -> None:
            nonlocal count
            number = first
            while time.perf_counter() < end:
                reply, _ = await target.generate([texts[number % len(texts)]])
                count += reply.failure is None and reply.ended < end
                number += 4

        await asyncio.gather(*map(run_client, range(4)))
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hostile", description=__doc__)
    parser.add_argument("crowds", nargs="*", default=CROWDS, metavar="crowd")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--be", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.be:
        be_crowd(asked.be[0], int(asked.be[1]), asked.be[2], asked.seconds)
        return
    if unknown := set(asked.crowds) - set(CROWDS):
        parser.error(f"no such crowd: {', '.join(unknown)}; there are {', '.join(CROWDS)}")
    last = max(os.sched_getaffinity(0))
    for name in asked.crowds:
        ratios = []
        for _ in range(asked.rounds):
            key, entry = make_key("benchmark")
            others = os.sched_getaffinity(0) - {last} or {last}
            os.sched_setaffinity(0, others)  # the server inherits it
            with served("--api-keys", str(entry)) as (port, server):
                os.sched_setaffinity(0, {last})
                alone = asyncio.run(answers(port, key, asked.seconds))
                command = [sys.executable, "-m", "tests.benchmarks.hostile", "--be", name, str(port), key]
                crowd = subprocess.Popen(
                    [*command, "--seconds", str(asked.seconds + 1)], stdout=subprocess.PIPE, text=True
                )
                time.sleep(1)
                before = psutil.Process(server.pid).memory_info().rss
                with watched(port, server) as (took, resident, wrong):
                    beside = asyncio.run(answers(port, key, asked.seconds))
                done, _ = crowd.communicate(timeout=60)
            os.sched_setaffinity(0, others | {last})
            ratios.append(beside / alone)
            print(
                f"{name:8} {int(done):7,} times  answers {beside / asked.seconds:6.1f}/s, {ratios[-1]:.2f} of "
                f"{alone / asked.seconds:6.1f}/s  probes {1000 * statistics.median(took):4.0f} ms, at most "
                f"{1000 * max(took):5.0f} ms, {len(wrong)} of {len(took)} wrong  memory {before / 2**20:.0f}, at most "
                f"{max(resident) / 2**20:.0f} MiB",
                flush=True,
            )
        if asked.rounds > 1:
            print(f"{name:8} median of answers: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
