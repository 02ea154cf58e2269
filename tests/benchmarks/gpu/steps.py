"""What a decoder step costs, by rows: no row joins or leaves, every sequence is as long as it may be.

The core of the service does the steps. Its time is taken apart: ONNX Runtime's run, to the end of the device's work;
the binding of inputs and outputs; the reordering of beams' rows; and everything else, which is Python.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from service.batch import Batch, Ints, StepOutput
from service.ladder import Ladder
from service.runner import Runner
from service.sequence import Floats
from service.state import State
from tests.benchmarks.gpu.asked import generation, new_core
from tests.benchmarks.gpu.floor import floor_of
from tests.benchmarks.gpu.request import Request, random_source
from tests.benchmarks.gpu.sessions import Timed

SOURCE_TOKENS = 24
WARM_UP = 6
_INDEX, _SCORE = 8, 4
"""Bytes of an id, a position or a length, and of a log-probability."""


@dataclass(frozen=True)
class Mode:
    """How the rows are decoded."""

    name: str
    least_k: int
    controls: dict[str, Any]

    @property
    def beams(self) -> int:
        """Rows of a sequence."""
        return int(self.controls.get("num_beams", 1))


MODES = (Mode("greedy, k 1", 1, {}), Mode("greedy, k 8", 8, {}), Mode("4 beams", 8, {"num_beams": 4}))


@dataclass(frozen=True)
class StepCost:
    """Medians over the steps of one mode at one number of rows, in milliseconds."""

    mode: str
    rows: int
    step_ms: float
    p90_ms: float
    tokens_per_second: float
    run_ms: float
    """In ONNX Runtime, the decoder."""
    bind_ms: float
    """Binding, with the copies of ids, positions and lengths to the device."""
    reorder_ms: float
    """In ONNX Runtime, moving the rows of beams."""
    host_ms: float
    """All the rest: outside of ONNX Runtime."""
    floor_ms: float | None
    weight_bytes: int | None
    state_bytes: int
    bus_bytes: int
    """Ids, positions and lengths to the device; candidates and their scores back; the new order of beams."""
    growth_ms: float | None
    """Of the step in which the state's capacity grew; it is not among the others."""
    steps: int


@dataclass(frozen=True)
class Steps:
    """The part `steps`."""

    precision: str
    source_tokens: int
    costs: list[StepCost]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sample:
    """One iteration, in seconds."""

    whole: float
    run: float
    bind: float
    reorder: float
    grew: bool

    @property
    def host(self) -> float:
        return self.whole - self.run - self.bind - self.reorder


class Meter:
    """A runner with a clock on it, for a core. Padding is never generated: as end token it lets no text end."""

    def __init__(self, runner: Runner, least_k: int) -> None:
        self._runner = runner.twin()
        self._least_k = least_k
        self._decoder: Any = Timed(runner._decoder)
        self._reorder: Any = Timed(runner._reorder)
        self._runner._decoder = self._decoder
        if runner._reorder is not None:
            self._runner._reorder = self._reorder
        self._stepping = 0.0
        special = runner.manifest.special_tokens
        endless = special.model_copy(update={"eos_id": special.pad_id})
        self.manifest = runner.manifest.model_copy(update={"special_tokens": endless})

    @property
    def seconds(self) -> tuple[float, float, float]:
        """So far: in the decoder's runs, in the rest of the runner's steps, in reordering."""
        return self._decoder.seconds, self._stepping - self._decoder.seconds, self._reorder.seconds

    def new_state(self, *, max_rows: int, source: Ladder, target: Ladder) -> State:
        """As the runner's."""
        return self._runner.new_state(max_rows=max_rows, source=source, target=target)

    def encode_into(self, state: State, ids: Ints, lengths: Ints) -> None:
        """As the runner's."""
        self._runner.encode_into(state, ids, lengths)

    def encode(self, ids: Ints, lengths: Ints) -> Floats:
        """As the runner's."""
        return self._runner.encode(ids, lengths)

    def score(
        self, source_ids: Ints, source_lengths: Ints, target_ids: Ints, *, alignment: bool
    ) -> tuple[Floats, Floats | None]:
        """As the runner's."""
        return self._runner.score(source_ids, source_lengths, target_ids, alignment=alignment)

    def step(self, batch: Batch, state: State, k: int, logits: bool) -> StepOutput:
        """As the runner's, with `least_k` candidates or more."""
        began = time.perf_counter()
        output = self._runner.step(batch, state, max(k, self._least_k), logits)
        self._stepping += time.perf_counter() - began
        return output


def look(request: Request) -> Steps:
    """The part `steps`. A number of rows that fails is a problem; the others are measured all the same."""
    runner = request.open_runner()
    costs, problems = [], []
    for mode in MODES:
        for rows in request.rows:
            if rows % mode.beams:
                continue  # the rows would not be full
            try:
                costs.append(measure(runner, request, rows, mode))
            except Exception as error:
                problems.append(f"{mode.name}, {rows} rows: {error}")
    return Steps(runner.precision, SOURCE_TOKENS, costs, problems)


def measure(runner: Runner, request: Request, rows: int, mode: Mode) -> StepCost:
    """Raises what a step does, and RuntimeError if rows came or went."""
    manifest, meter = runner.manifest, Meter(runner, mode.least_k)
    count = min(request.steps, manifest.max_target_tokens - WARM_UP - 1)
    core = new_core(meter, rows, encode_tokens=rows * manifest.max_source_tokens)
    rng = random.Random(rows)
    sequences = [
        generation(random_source(manifest, rng, SOURCE_TOKENS), WARM_UP + count + 1, **mode.controls).sequence
        for _ in range(rows // mode.beams)
    ]
    core.add(sequences)
    for _ in range(WARM_UP):
        core.iterate()
    samples = []
    for _ in range(count):
        before, growths, began = meter.seconds, core.state.growths, time.perf_counter()
        core.iterate()
        whole = time.perf_counter() - began
        run, bind, reorder = (now - then for now, then in zip(meter.seconds, before, strict=True))
        samples.append(_Sample(whole, run, bind, reorder, grew=core.state.growths > growths))
        if core.batch.rows != rows:
            raise RuntimeError(f"{core.batch.rows} rows took a step, not {rows}")
    core.cancel(sequences)
    return _cost(runner, request, rows, mode, samples)


def _cost(runner: Runner, request: Request, rows: int, mode: Mode, samples: list[_Sample]) -> StepCost:
    plain = [sample for sample in samples if not sample.grew] or samples
    floor = floor_of(
        runner,
        rows=rows,
        source=SOURCE_TOKENS,
        target=WARM_UP + len(samples) / 2,
        bandwidth=request.bandwidth,
    )
    k = max(mode.least_k, 2 * mode.beams if mode.beams > 1 else 1)
    whole = statistics.median(sample.whole for sample in plain)
    ranked = sorted(sample.whole for sample in plain)
    return StepCost(
        mode=mode.name,
        rows=rows,
        step_ms=1e3 * whole,
        p90_ms=1e3 * ranked[int(0.9 * (len(ranked) - 1))],
        tokens_per_second=rows / whole,
        run_ms=1e3 * statistics.median(sample.run for sample in plain),
        bind_ms=1e3 * statistics.median(sample.bind for sample in plain),
        reorder_ms=1e3 * statistics.median(sample.reorder for sample in plain),
        host_ms=1e3 * statistics.median(sample.host for sample in plain),
        floor_ms=floor.milliseconds,
        weight_bytes=floor.weight_bytes,
        state_bytes=floor.state_bytes,
        bus_bytes=rows * (3 * _INDEX + k * (_INDEX + _SCORE) + (_INDEX if mode.beams > 1 else 0)),
        growth_ms=next((1e3 * sample.whole for sample in samples if sample.grew), None),
        steps=len(plain),
    )
