"""A run as text: a line per point, and below it what a reader should know before believing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.bench.report import Point, Run
from service.bench.workload import Clients, Rate

_Cell = Callable[[Point], str | None]

_KEEPS_PACE = 0.9
"""A server that answers less than this share of what arrives is said to fall behind."""

_BUSY = 0.7
"""A load generator that takes more than this share of its one core may be what is measured."""


def table(run: Run) -> str:
    """Columns that no point can fill are left out."""
    filled = [(title, [cell(point) for point in run.points]) for title, cell in _columns()]
    columns = [(title, cells) for title, cells in filled if any(cells)]
    lines = _aligned([title for title, _ in columns], [cells for _, cells in columns])
    return "\n".join([*lines, *notes(run)])


def notes(run: Run) -> list[str]:
    """What a table does not show: kinds of failures, a server that falls behind, what the load itself cost."""
    found = []
    for point in run.points:
        name = str(Rate(point.rate) if point.rate is not None else Clients(point.clients or 0))
        if point.interrupted:
            found.append(f"{name}: interrupted after {point.seconds:.1f} s")
        if point.failures:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in point.failures.items())
            found.append(f"{name}: {point.failed} of {point.failed + point.requests} requests failed: {kinds}")
        if point.requests_per_second < _KEEPS_PACE * (point.arrivals_per_second or 0.0):
            found.append(
                f"{name}: the server fell behind, {point.requests_per_second:.1f} of {point.arrivals_per_second:.1f} "
                "requests/s were answered; how late they were depends on how long that goes on"
            )
        if point.generator_cpu_share > _BUSY:
            found.append(
                f"{name}: the load itself took {point.generator_cpu_share:.0%} of the one core it can use; "
                "the server may be faster than this"
            )
    costs = [point.generator_cpu_per_request for point in run.points if point.generator_cpu_per_request is not None]
    if costs:
        low, high = (f"{cost * 1e3:.2f}" for cost in (min(costs), max(costs)))
        share = max(point.generator_cpu_share for point in run.points)
        found.append(
            f"the load itself took {low if low == high else f'{low} to {high}'} ms of processor time per request, "
            f"{share:.0%} of a core at most"
        )
    return found


def _columns() -> list[tuple[tuple[str, str], _Cell]]:
    """Each column's title, in two lines, and how a point fills it."""
    return [
        (("", "clients"), lambda point: _text(point.clients, "d")),
        (("offered", "/s"), lambda point: _text(point.rate, "g")),
        (("", "requests"), lambda point: _text(point.requests, ",d")),
        (("", "failed"), lambda point: _text(point.failed or None, ",d")),
        (("requests", "/s"), lambda point: _text(point.requests_per_second, ",.1f")),
        (
            ("inputs", "/s"),
            lambda point: _text(_unless_equal(point.inputs_per_second, point.requests_per_second), ",.1f"),
        ),
        (("tokens", "/s"), lambda point: _text(point.tokens_per_second, ",.0f")),
        (("mean", "ms"), lambda point: _milliseconds(point.latency and point.latency.mean)),
        (("p50", "ms"), lambda point: _milliseconds(point.latency and point.latency.p50)),
        (("p95", "ms"), lambda point: _milliseconds(point.latency and point.latency.p95)),
        (("p99", "ms"), lambda point: _milliseconds(point.latency and point.latency.p99)),
        (("1st token", "p50 ms"), lambda point: _milliseconds(point.first_token and point.first_token.p50)),
        (("1st token", "p99 ms"), lambda point: _milliseconds(point.first_token and point.first_token.p99)),
        (("1st token", "mean ms"), lambda point: _milliseconds(_first_token_by_server(point))),
        (("sent late", "p99 ms"), lambda point: _milliseconds(point.sent_late and point.sent_late.p99)),
        (("rows", "/step"), lambda point: _text(point.server and point.server.rows_per_step, ".1f")),
        (("", "padding"), lambda point: _text(point.server and point.server.padding_share, ".1%")),
        (("server", "MiB"), lambda point: _text(_mebibytes(point), ",.0f")),
        (("server", "cores"), lambda point: _text(_cores(point), ".2f")),
    ]


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _milliseconds(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _unless_equal(value: float, other: float) -> float | None:
    return None if value == other else value


def _first_token_by_server(point: Point) -> float | None:
    """Where no stream shows it."""
    return point.server.first_token_seconds if point.server is not None and point.first_token is None else None


def _mebibytes(point: Point) -> float | None:
    if point.server is None or point.server.resident_bytes is None:
        return None
    return point.server.resident_bytes / 2**20


def _cores(point: Point) -> float | None:
    if point.server is None or point.server.cpu_seconds is None or not point.seconds:
        return None
    return point.server.cpu_seconds / point.seconds


def _aligned(titles: Sequence[tuple[str, str]], columns: Sequence[Sequence[str | None]]) -> list[str]:
    """Right-aligned cells below their titles, two blanks between columns."""
    cells = [[*title, *(text or "-" for text in column)] for title, column in zip(titles, columns, strict=True)]
    widths = [max(map(len, column)) for column in cells]
    rows = zip(*cells, strict=True)
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
