"""What a server says of itself at GET /metrics, before and after, and what that tells of the time between.

Reads the text format of Prometheus. A server that has no such page, or other metrics, lacks some figures or all.
"""

from __future__ import annotations

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict


class ServerFigures(BaseModel):
    """The server's part of a point; None where its metrics do not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None
    """Decoder steps."""
    rows_per_step: float | None
    """Sequences that a decoder step carried, on average."""
    padding_share: float | None
    """Share of the encoded source tokens that were only padding."""
    first_token_seconds: float | None
    """From submission to the first token, on average: HTTP is not in it."""
    cpu_seconds: float | None
    resident_bytes: int | None
    """At the end."""


def server_figures(before: str, after: str) -> ServerFigures:
    """From two pages of metrics. A counter that went back (the server was started anew) tells nothing."""
    old, new = _samples(before), _samples(after)

    def growth(name: str) -> float | None:
        if name not in old or name not in new or new[name] < old[name]:
            return None
        return new[name] - old[name]

    def mean(histogram: str) -> float | None:
        return _ratio(growth(f"{histogram}_sum"), growth(f"{histogram}_count"))

    steps, resident = growth("transduce_batch_rows_count"), new.get("process_resident_memory_bytes")
    padding, source = growth("transduce_padding_tokens_total"), growth("transduce_source_tokens_total")
    return ServerFigures(
        steps=None if steps is None else round(steps),
        rows_per_step=mean("transduce_batch_rows"),
        padding_share=None if padding is None or source is None else _ratio(padding, padding + source),
        first_token_seconds=mean("transduce_time_to_first_token_seconds"),
        cpu_seconds=growth("process_cpu_seconds_total"),
        resident_bytes=None if resident is None else round(resident),
    )


def _samples(page: str) -> dict[str, float]:
    """Each sample's value, summed over labels; nothing from a page in another format."""
    values: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                values[sample.name] += sample.value
    except ValueError:
        return {}
    return dict(values)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
