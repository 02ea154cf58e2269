"""The default artifact under load, over real connections."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

import pytest

from service.bench.report import Reply
from service.bench.target import Target
from tests.benchmarks.load import drive, metric, resident_mebibytes, sentences, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_sixty_four_clients_get_the_very_answers_of_one() -> None:
    """2,000 texts of mixed length: each answer is the one the text gets alone, steps carry many rows, and many clients
    together are served several times as fast as one."""
    texts = sentences(2000)
    with served() as (port, _):
        alone = asyncio.run(drive(port, texts, 1))
        steps, rows = metric(port, "transduce_batch_rows_count"), metric(port, "transduce_batch_rows_sum")
        together = asyncio.run(drive(port, random.Random(1).sample(texts, len(texts)), 64))
        steps = metric(port, "transduce_batch_rows_count") - steps
        rows = metric(port, "transduce_batch_rows_sum") - rows
    assert not alone.failures
    assert not together.failures
    assert together.texts == alone.texts
    assert rows / steps > 16
    assert alone.seconds / together.seconds > 2


def test_memory_does_not_grow_with_traffic() -> None:
    """Resident memory after 10,000 requests of mixed length is within 50 MiB of what it was after 1,000."""
    texts = sentences(10000, seed=2)
    with served() as (port, server):
        asyncio.run(drive(port, texts[:1000], 64))
        before = resident_mebibytes(server)
        outcome = asyncio.run(drive(port, texts[1000:], 64))
        after = resident_mebibytes(server)
    assert not outcome.failures
    assert after - before < 50


def test_a_busy_server_answers_what_it_accepted_and_ends_with_zero() -> None:
    """SIGTERM while 64 requests run: all of them are answered whole, and the exit status is 0."""
    texts = [" ".join(sentences(8, seed=n)) for n in range(64)]
    with served() as (port, server):
        alone = asyncio.run(drive(port, texts, 1)).texts

        async def run() -> list[tuple[Reply, Any]]:
            async with Target(f"http://127.0.0.1:{port}") as target:
                tasks = [asyncio.create_task(target.generate([text])) for text in texts]
                for _ in range(1000):
                    if await asyncio.to_thread(metric, port, "transduce_num_requests_running") >= 32:
                        break
                server.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks)

        answers = asyncio.run(run())
        assert server.wait(30) == 0
    for text, (reply, answer) in zip(texts, answers, strict=True):
        assert reply.failure is None
        assert {answer["outputs"][0]["sequences"][0]["text"]} == alone[text]
