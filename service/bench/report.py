"""What a run found, as JSON holds it: every point, and what is needed to read or repeat it. All times in seconds.

Pure: replies and a window of time go in. What is counted depends on the loop:

- Closed: the requests *answered* in the window. The same load stands before and after it, so none is missing.
- Open: the requests *due* in the window, whenever they were answered, since a server that falls behind answers late.
  Latency runs from the moment a request was due, not from when it could be sent (no coordinated omission).

Rates are of what was answered in the window, in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from service.bench.exposition import ServerFigures
from service.bench.workload import Clients, Load


@dataclass(frozen=True, slots=True)
class Reply:
    """One request and how it ended. Times are of time.perf_counter()."""

    due: float
    sent: float
    first: float | None
    """When the first event of a stream came."""
    ended: float
    inputs: int
    source_tokens: int = 0
    generated_tokens: int = 0
    failure: str | None = None
    """None if it was answered as it should be; else one of few words: a status and type, connection, timeout, ..."""


@dataclass(frozen=True)
class Window:
    """The time that counts."""

    opened: float
    closed: float
    cpu_seconds: float
    """Processor time that the load generator itself took."""

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.closed - self.opened


class Record(BaseModel):
    """A value with names, written to JSON and read from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(Record):
    """How a quantity was spread over the requests. Each percentile is a value that was measured (nearest rank)."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """None if there are no values."""
        if not values:
            return None
        p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99), method="inverted_cdf").tolist()
        return cls(mean=float(np.mean(values)), p50=p50, p95=p95, p99=p99, max=max(values))


class Point(Record):
    """What one load did: `clients` of a closed loop, or the `rate` that an open loop offered."""

    clients: int | None
    rate: float | None
    interrupted: bool
    """Whether somebody stopped it: it holds what there was."""
    seconds: float
    requests: int
    """Answered, and counted in the latencies."""
    failures: dict[str, int]
    """By status and type, of the same requests."""
    requests_per_second: float
    inputs_per_second: float
    source_tokens_per_second: float
    tokens_per_second: float
    """Generated."""
    arrivals_per_second: float | None
    """Of an open loop: what chance made of the rate."""
    latency: Spread | None
    first_token: Spread | None
    """Of streams: to their first event."""
    sent_late: Spread | None
    """Of an open loop: from when a request was due to when it was sent. Part of the latency, and not the server's."""
    generator_cpu_per_request: float | None
    generator_cpu_share: float
    """Of one core."""
    server: ServerFigures | None

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(self.failures.values())


class Run(Record):
    """A sweep: points in the order in which they were measured."""

    version: str
    command: str
    started: str
    """UTC, ISO 8601."""
    url: str
    model: dict[str, Any] | None
    """What the server says of the model at GET /v1/models, if it has that."""
    settings: dict[str, Any]
    machine: dict[str, Any]
    """Where the load came from."""
    points: list[Point]


def summarise(
    load: Load, replies: Sequence[Reply], window: Window, server: ServerFigures | None, *, interrupted: bool = False
) -> Point:
    """One point from everything that was answered, before, in and after the window."""
    closed_loop = isinstance(load, Clients)
    answered = [one for one in replies if window.opened < one.ended <= window.closed]
    counted = answered if closed_loop else [one for one in replies if window.opened <= one.due < window.closed]
    good = [one for one in counted if one.failure is None]
    sent = [one.sent - one.due for one in counted if one.failure != NOT_SENT]
    done = [one for one in answered if one.failure is None]
    seconds = window.seconds

    def per_second(amount: int) -> float:
        return amount / seconds if seconds else 0.0

    return Point(
        clients=load.count if isinstance(load, Clients) else None,
        rate=None if isinstance(load, Clients) else load.per_second,
        interrupted=interrupted,
        seconds=seconds,
        requests=len(good),
        failures=dict(Counter(one.failure for one in counted if one.failure is not None).most_common()),
        requests_per_second=per_second(len(done)),
        inputs_per_second=per_second(sum(one.inputs for one in done)),
        source_tokens_per_second=per_second(sum(one.source_tokens for one in done)),
        tokens_per_second=per_second(sum(one.generated_tokens for one in done)),
        arrivals_per_second=None if closed_loop else per_second(len(counted)),
        latency=Spread.of([one.ended - one.due for one in good]),
        first_token=Spread.of([one.first - one.due for one in good if one.first is not None]),
        sent_late=None if closed_loop else Spread.of(sent),
        generator_cpu_per_request=window.cpu_seconds / len(answered) if answered else None,
        generator_cpu_share=window.cpu_seconds / seconds if seconds else 0.0,
        server=server,
    )


NOT_SENT = "not sent"
"""The failure of an arrival that found as many requests in flight as are allowed."""
