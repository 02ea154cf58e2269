"""What is asked of a server: by how many clients or at which rate, which texts, how often."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from service.lines import read_lines


@dataclass(frozen=True)
class Clients:
    """Closed loop: so many clients, each of which sends its next request when its last one is answered."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"there has to be at least one client, not {self.count}")

    def __str__(self) -> str:
        return f"{self.count} client{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Rate:
    """Open loop: Poisson arrivals, so many a second on average, whatever the server does."""

    per_second: float

    def __post_init__(self) -> None:
        if not 0 < self.per_second < 1e6:
            raise ValueError(f"a rate has to be above 0 and below a million a second, not {self.per_second:g}")

    def __str__(self) -> str:
        return f"{self.per_second:g}/s"


Load = Clients | Rate


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests of one point, the same for every load and every server: texts in an order that `seed` decides.

    A point lasts for `requests`, or for `duration` seconds, one of the two; the `warm_up` requests before are not
    counted. `max_in_flight` bounds what an open loop has open at a time: an arrival beyond it is not sent, and fails.
    """

    texts: Sequence[str]
    requests: int | None = None
    duration: float | None = None
    warm_up: int | None = None
    inputs_per_request: int = 1
    seed: int = 0
    max_in_flight: int = 1024

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("there is no text to send")
        if (self.requests is None) == (self.duration is None):
            raise ValueError("a point lasts either for a number of requests or for a duration")
        positive = {"requests": self.requests, "duration": self.duration, "max_in_flight": self.max_in_flight}
        positive["inputs_per_request"] = self.inputs_per_request
        for name, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} has to be above 0, not {value:g}")
        if self.warm_up is not None and self.warm_up < 0:
            raise ValueError(f"warm_up cannot be {self.warm_up}")

    def warm_up_of(self, load: Load) -> int:
        """Requests before the counting begins: two of each client, or two seconds of arrivals, if it was not said."""
        if self.warm_up is not None:
            return self.warm_up
        return 2 * load.count if isinstance(load, Clients) else round(2 * load.per_second)

    def draw(self) -> Iterator[list[str]]:
        """The inputs of one request after another, without end: all texts in random order, then all in another."""
        rng = random.Random(self.seed)
        line = (text for _ in iter(int, 1) for text in rng.sample(self.texts, len(self.texts)))
        while True:
            yield [next(line) for _ in range(self.inputs_per_request)]

    def arrivals(self, rate: Rate) -> Iterator[float]:
        """When each request of an open loop is due, in seconds from the beginning, without end."""
        rng = random.Random(self.seed)
        due = 0.0
        while True:
            due += rng.expovariate(rate.per_second)
            yield due


def read_texts(stream: BinaryIO) -> list[str]:
    """The lines of a file, without those that are blank."""
    return [line.text for line in read_lines(stream) if line.text.strip()]
