"""A picture of a run: latency against load, and throughput against load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from service.bench.report import Point, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"p99": "#b2182b", "p95": "#e08214", "p50": "#1b7837"}
_BLUE = "#2166ac"
_MISSING = float("nan")


def draw(run: Run, path: Path) -> None:
    """Write it, 1,200 pixels wide if it is a PNG; the file's ending decides. Raises OSError."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = sorted(run.points, key=_load)
    with rc_context({"font.size": 13}):
        figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
        latency, throughput = figure.subplots(2, 1, sharex=True)
        _draw_latency(latency, points)
        if all(point.clients is not None for point in points):
            _draw_plateau(throughput, points)
        else:
            _draw_answered(throughput, points)
        for axes in (latency, throughput):
            axes.grid(True, which="both", alpha=0.3)
        figure.suptitle(_title(run), fontsize=15)
        figure.savefig(path)


def _draw_latency(axes: Axes, points: list[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, colour in _COLOURS.items():
        heights = [getattr(point.latency, name) * 1e3 if point.latency else _MISSING for point in points]
        axes.plot([_load(point) for point in points], heights, marker="o", color=colour, label=name)
    axes.set_ylabel("latency (ms)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left")


def _draw_plateau(axes: Axes, points: list[Point]) -> None:
    """Of a closed loop: whether throughput rises with the clients and then stays."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    loads, heights = [_load(point) for point in points], [point.tokens_per_second for point in points]
    axes.plot(loads, heights, marker="o", color=_BLUE)
    for load, height in zip(loads, heights, strict=True):
        axes.annotate(f"{height:,.0f}", (load, height), (0, -20), textcoords="offset points", ha="center", color=_BLUE)
    axes.set_ylabel("generated tokens per second")
    axes.set_ylim(0, 1.1 * max(heights) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("clients, each of which sends its next request when its last is answered")
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_answered(axes: Axes, points: list[Point]) -> None:
    """Of an open loop: up to which rate the server keeps pace."""
    loads = [_load(point) for point in points]
    axes.plot([0, max(loads)], [0, max(loads)], linestyle="--", color="grey", label="offered")
    axes.plot(
        loads, [point.requests_per_second for point in points], marker="o", color=_BLUE, label="answered",
    )  # fmt: skip
    axes.set_ylabel("answered requests per second")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1.05 * max(loads))
    axes.set_xlabel("offered requests per second (Poisson arrivals)")
    axes.legend(loc="upper left")


def _load(point: Point) -> float:
    return point.clients if point.clients is not None else point.rate or 0.0


def _title(run: Run) -> str:
    """Which model, and what was asked of it."""
    name = run.model.get("id") if run.model else None
    parameters = ", ".join(f"{key} {value}" for key, value in run.settings.get("parameters", {}).items())
    return ", ".join(str(part) for part in (name or run.url, parameters, run.started[:10]) if part)
