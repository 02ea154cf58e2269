"""Sequences that the measurement asks for, and the cores that answer them without a thread."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry

from service.core import Core
from service.executes import Executes
from service.metrics import Families, Metrics
from service.sequence import Event, GenerateParameters, Sequence


class Asked:
    """A sequence and the last that it was told."""

    def __init__(self, source_ids: list[int], **options: Any) -> None:
        """`options` are those of Sequence; of kind generate if there are `parameters`."""
        self.event: Event | None = None
        self.sequence = Sequence(source_ids, self._hear, **options)

    def _hear(self, event: Event) -> None:
        self.event = event


def generation(source_ids: list[int], max_new_tokens: int, **controls: Any) -> Asked:
    """Text for a source."""
    return Asked(source_ids, parameters=GenerateParameters(max_new_tokens, **controls))


def new_metrics() -> Metrics:
    """On a registry of their own."""
    return Families(CollectorRegistry()).of("measured")


def new_core(runner: Executes, max_rows: int, encode_tokens: int = 1024) -> Core:
    """So many rows on these graphs."""
    return Core(runner, new_metrics(), max_rows=max_rows, encode_tokens=encode_tokens, clock=time.monotonic)


def finish(core: Core) -> None:
    """Iterate until nothing is left to do."""
    while not core.idle:
        core.iterate()
