"""The whole service but HTTP: its engine with its threads, so many sequences at once until all have been answered."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from service.artifact import Artifact
from service.core import Core
from service.engine import Engine
from service.metrics import PHASES, Metrics
from service.rehearsal import warm_up
from service.runner import Runner
from service.sequence import Event, Failed, Finished, GenerateParameters, Sequence
from tests.benchmarks.gpu.asked import new_metrics
from tests.benchmarks.gpu.request import Request, sources_of

_ROUNDS = 4
"""Sequences in all, for each that runs at once."""
_DIFFERENT = 256
_PATIENCE = 120.0
"""Seconds that a run may take."""


@dataclass(frozen=True)
class Run:
    """One run; the ramp at its end, when rows become free and nobody waits, is in it."""

    concurrency: int
    workers: int
    sequences: int
    tokens: int
    seconds: float
    tokens_per_second: float
    rows_per_step: float
    phases: dict[str, float]
    """Seconds of the workers' time, by phase of an iteration."""


@dataclass(frozen=True)
class Throughput:
    """The part `service`."""

    precision: str
    runs: list[Run]
    problems: list[str] = field(default_factory=list)


def look(request: Request) -> Throughput:
    """The part `service`. One worker as on a GPU by default; at the most rows two as well, which share its sessions."""
    artifact, runner = request.load(), request.open_runner()
    runs, problems = [], []
    ways = [(concurrency, 1) for concurrency in request.concurrency]
    for concurrency, workers in [*ways, (max(request.concurrency), 2)]:
        try:
            runs.append(serve(artifact, runner, request, concurrency, workers))
        except Exception as error:
            problems.append(f"{concurrency} sequences, {workers} workers: {error}")
    return Throughput(runner.precision, runs, problems)


def serve(artifact: Artifact, runner: Runner, request: Request, concurrency: int, workers: int) -> Run:
    """Raises RuntimeError if a sequence fails, or not all are answered in time."""
    metrics, manifest = new_metrics(), artifact.manifest
    settings = request.settings(max_rows=concurrency, workers=workers, max_queue=_ROUNDS * concurrency)

    def open_cores() -> list[Core]:
        """The service's own, but for the self-test: what that says is told by the part `placement`."""
        runners = [runner.twin() for _ in range(workers)]
        cores = [
            Core(
                twin,
                metrics,
                max_rows=concurrency // workers,
                encode_tokens=settings.encode_tokens,
                clock=time.monotonic,
            )
            for twin in runners
        ]
        for twin, core in zip(runners, cores, strict=True):
            warm_up(twin, core.state, core.batch, core.ladder, encode_tokens=settings.encode_tokens)
        return cores

    pool = sources_of(manifest, min(_DIFFERENT, _ROUNDS * concurrency))
    parameters = GenerateParameters(max_new_tokens=min(64, manifest.max_target_tokens))
    answers = _Answers(_ROUNDS * concurrency)
    sequences = [
        Sequence(pool[number % len(pool)], answers.hear, parameters=parameters) for number in range(answers.wanted)
    ]
    engine = Engine(artifact, settings, metrics, open_cores=open_cores)
    engine.start()
    try:
        engine.wait_ready(_PATIENCE)
        warm = _sums(metrics)
        began = time.perf_counter()
        engine.submit(sequences)
        if not answers.complete.wait(_PATIENCE):
            raise RuntimeError(f"{answers.heard} of {answers.wanted} sequences were answered in {_PATIENCE:.0f} s")
        seconds = time.perf_counter() - began
    finally:
        engine.stop()
    if answers.failures:
        raise RuntimeError(f"{len(answers.failures)} sequences failed: {answers.failures[0]}")
    spent = {name: total - warm[name] for name, total in _sums(metrics).items()}
    return Run(
        concurrency,
        workers,
        sequences=answers.wanted,
        tokens=answers.tokens,
        seconds=seconds,
        tokens_per_second=answers.tokens / seconds,
        rows_per_step=spent["rows"] / max(1.0, spent["steps"]),
        phases={phase: spent[phase] for phase in PHASES},
    )


class _Answers:
    """Counts what the workers' threads tell."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.heard = 0
        self.tokens = 0
        self.failures: list[Exception] = []
        self.complete = threading.Event()
        self._lock = threading.Lock()

    def hear(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Finished):
                self.tokens += sum(len(result.ids) for result in event.results)
            elif isinstance(event, Failed):
                self.failures.append(event.error)
            self.heard += 1
            if self.heard == self.wanted:
                self.complete.set()


def _sums(metrics: Metrics) -> dict[str, float]:
    """Sums of the metrics that the engine keeps: seconds by phase, rows, steps."""
    found = dict.fromkeys((*PHASES, "rows", "steps"), 0.0)
    names = {"transduce_batch_rows_sum": "rows", "transduce_batch_rows_count": "steps"}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name == "transduce_iteration_seconds_sum":
                found[sample.labels["phase"]] += sample.value
            elif sample.name in names:
                found[names[sample.name]] += sample.value
    return found
