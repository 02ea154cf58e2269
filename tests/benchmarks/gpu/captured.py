"""Decoder steps as CUDA graphs, which the service does not do: are they taken, do they say the same, do they pay?

Everything but `k` lies on the device at fixed addresses, shapes are fixed by rows and k, and each pair of these is a
graph of its own (run option `gpu_graph_id`). `k` is read by the host when a graph is captured, and stays what it was.
Compared with the same steps, bound in the same way, without capture.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from service.artifact import Artifact
from tests.benchmarks.gpu.request import Request
from tests.benchmarks.gpu.sessions import open_session, state_arrays

_K = (1, 8)
_SOURCE, _TARGET = 32, 64
"""Capacities of the state."""
_WARM_UP = 4


@dataclass(frozen=True)
class CapturedCost:
    """One number of rows and one k: medians in milliseconds, without and with capture."""

    rows: int
    k: int
    run_ms: float
    captured_run_ms: float
    step_ms: float
    """With ids and positions copied to the device, candidates copied back."""
    captured_step_ms: float
    first_run_ms: float
    """Of the run that captured."""
    same_bits: bool
    """Of all candidates and scores of all steps."""


@dataclass(frozen=True)
class Captured:
    """The part `captured`."""

    costs: list[CapturedCost]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Times:
    first: float
    runs: list[float]
    steps: list[float]
    said: bytes


class _Steps:
    """Steps of a fixed number of rows and candidates, all of whose memory stays in its place."""

    def __init__(self, session: Any, artifact: Artifact, request: Request, rows: int, k: int, graph_id: int) -> None:
        self._session, self._rows = session, rows
        place = (request.device, request.device_id)

        def on_device(array: np.ndarray) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *place)

        arrays = state_arrays(session, artifact.manifest, rows, source=_SOURCE, target=_TARGET)
        self._state = {name: on_device(array) for name, array in arrays.items()}
        self._last_ids, self._positions = (on_device(np.zeros(rows, np.int64)) for _ in range(2))
        self._lengths = on_device(np.full(rows, _SOURCE - 8, np.int64))
        self._k = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(k, np.int64))
        self._ids = on_device(np.zeros((rows, k), np.int64))
        self._scores = on_device(np.zeros((rows, k), np.float32))
        self._binding = binding = session.io_binding()
        inputs = {"last_ids": self._last_ids, "positions": self._positions, "source_lengths": self._lengths}
        for name, value in {**inputs, "k": self._k, **self._state}.items():
            binding.bind_ortvalue_input(name, value)
        outputs = {"candidate_ids": self._ids, "candidate_scores": self._scores}
        written = {port.name for port in session.get_outputs()}
        outputs |= {f"next_{name}": value for name, value in self._state.items() if f"next_{name}" in written}
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))

    def time(self, vocab_size: int, count: int) -> _Times:
        """Steps that read given tokens, so that with and without capture they are the same ones."""
        rng = np.random.default_rng(1)
        runs, steps, said = [], [], []
        for position in range(_WARM_UP + count):
            tokens = rng.integers(3, vocab_size, self._rows)
            began = time.perf_counter()
            self._last_ids.update_inplace(tokens)
            self._positions.update_inplace(np.full(self._rows, position % _TARGET))
            bound = time.perf_counter()
            self._session.run_with_iobinding(self._binding, self._options)
            ran = time.perf_counter()
            said += [self._ids.numpy().tobytes(), self._scores.numpy().tobytes()]
            steps.append(time.perf_counter() - began)
            runs.append(ran - bound)
        return _Times(runs[0], runs[_WARM_UP:], steps[_WARM_UP:], b"".join(said))


def look(request: Request) -> Captured:
    """The part `captured`. What ONNX Runtime refuses is a problem, in its own words."""
    if request.provider != "cuda":
        return Captured([], [f"CUDA graphs: not on {request.provider}"])
    artifact = request.load()
    path = artifact.graph(artifact.manifest.variants[request.provider].decoder)
    plain = open_session(path, request)
    try:
        capturing = open_session(path, request, capture=True)
    except Exception as error:
        return Captured([], [], [f"CUDA graphs are refused: {error}"])
    costs, problems = [], []
    pairs = [(rows, k) for k in _K for rows in request.rows]
    for number, (rows, k) in enumerate(pairs, start=1):
        try:
            costs.append(_compare(artifact, request, rows, k, plain, capturing, number))
        except Exception as error:
            problems.append(f"{rows} rows, k {k}: {error}")
    problems += [f"{cost.rows} rows, k {cost.k}: captured steps say other bits" for cost in costs if not cost.same_bits]
    return Captured(costs, [], problems)


def _compare(
    artifact: Artifact, request: Request, rows: int, k: int, plain: Any, capturing: Any, number: int
) -> CapturedCost:
    vocab_size, count = artifact.manifest.vocab_size, min(request.steps, _TARGET - _WARM_UP)
    without = _Steps(plain, artifact, request, rows, k, -1).time(vocab_size, count)  # -1: nothing is captured
    with_it = _Steps(capturing, artifact, request, rows, k, number).time(vocab_size, count)
    return CapturedCost(
        rows,
        k,
        run_ms=1e3 * statistics.median(without.runs),
        captured_run_ms=1e3 * statistics.median(with_it.runs),
        step_ms=1e3 * statistics.median(without.steps),
        captured_step_ms=1e3 * statistics.median(with_it.steps),
        first_run_ms=1e3 * with_it.first,
        same_bits=without.said == with_it.said,
    )
