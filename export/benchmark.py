"""Times an artifact's graphs on the CPU: `python -m export.benchmark ARTIFACT [--threads 1] [--variant cpu]`.

State is bound in place as the service binds it. Prints the median and the least of many runs: on a machine that does
other work, the least is nearer to what the graph costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from export.artifact_decoder import open_session

ROWS = (1, 8, 32, 64)
SHAPES = ((1, 8), (1, 16), (8, 16), (32, 16), (8, 64), (1, 512))
MIXED = (8, 32)
"""Rows of a call with sources of 4 to 16 tokens, 10 on average."""
TARGET_CAPACITY, SOURCE_CAPACITY, MOST_POSITIONS = 64, 16, 20


def milliseconds(run: Callable[[], object], runs: int) -> tuple[float, float]:
    """The median and the least time of a call."""
    times = []
    for turn in range(runs + 5):
        start = time.perf_counter()
        run()
        if turn >= 5:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), min(times)


def time_step(
    session: onnxruntime.InferenceSession, state: list[dict[str, Any]], rows: int, k: int
) -> tuple[float, float]:
    """A decoder step with rows at different positions."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "last_ids": rng.integers(3, 100, rows),
        "positions": rng.integers(0, MOST_POSITIONS, rows),
        "source_lengths": rng.integers(4, SOURCE_CAPACITY + 1, rows),
        "k": np.array(k),
    }
    feeds |= _some_state(session, state, rows, SOURCE_CAPACITY)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for port in session.get_outputs():
        if port.name.startswith("next_"):
            binding.bind_ortvalue_output(port.name, values[port.name.removeprefix("next_")])
        elif port.name != "logits":
            binding.bind_output(port.name)
    return milliseconds(lambda: session.run_with_iobinding(binding), 200)


def time_encoder(session: onnxruntime.InferenceSession, lengths: Sequence[int]) -> tuple[float, float]:
    """An encoder call of sources of these lengths, without its memory, as for a translation."""
    size = max(lengths)
    feeds = {
        "source_ids": np.random.default_rng(0).integers(3, 100, (len(lengths), size)),
        "source_lengths": np.array(lengths),
        "source_capacity": np.array(size),
    }
    states = [port.name for port in session.get_outputs() if port.name != "memory"]
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    return milliseconds(lambda: session.run(states, feeds, options), 30)


def time_scorer(
    session: onnxruntime.InferenceSession, state: list[dict[str, Any]], rows: int, size: int, alignment: bool
) -> tuple[float, float]:
    """Targets without padding, for sources as long."""
    feeds = {
        "target_ids": np.random.default_rng(0).integers(3, 100, (rows, size)),
        "source_lengths": np.full(rows, size),
        **_some_state(session, [tensor for tensor in state if tensor["kind"] == "source"], rows, size),
    }
    outputs = ["log_probabilities", "alignment"] if alignment else ["log_probabilities"]
    return milliseconds(lambda: session.run(outputs, feeds), 30)


def _some_state(
    session: onnxruntime.InferenceSession, state: list[dict[str, Any]], rows: int, source_capacity: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = {"rows": rows, "target_capacity": TARGET_CAPACITY, "source_capacity": source_capacity}
    types = {port.name: np.float16 if port.type == "tensor(float16)" else np.float32 for port in session.get_inputs()}
    return {
        tensor["name"]: rng.normal(
            size=[axis if isinstance(axis, int) else sizes[axis] for axis in tensor["shape"]]
        ).astype(types[tensor["name"]])
        for tensor in state
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m export.benchmark", description="Time an artifact's graphs.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--variant", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    manifest = json.loads((arguments.artifact / "manifest.json").read_text(encoding="utf-8"))
    files = manifest["variants"][arguments.variant]
    decoder = open_session(arguments.artifact / files["decoder"], arguments.threads)
    encoder = open_session(arguments.artifact / files["encoder"], arguments.threads)
    out = sys.stdout
    out.write(f"{manifest['name']}, {files['precision']}, {arguments.threads} threads: median (least) in ms\n")
    for k in (1, 8):
        for rows in ROWS:
            median, least = time_step(decoder, manifest["state"], rows, k)
            out.write(f"decoder step, {rows:3d} rows, k {k}:    {median:8.3f} ({least:.3f})\n")
    for rows, size in SHAPES:
        median, least = time_encoder(encoder, [size] * rows)
        out.write(f"encoder, {rows:3d} rows of {size:3d} tokens: {median:8.2f} ({least:.2f})\n")
    for rows in MIXED:
        median, least = time_encoder(encoder, np.linspace(4, 16, rows).round().astype(int).tolist())
        out.write(f"encoder, {rows:3d} rows of 4 to 16 tokens: {median:7.2f} ({least:.2f})\n")
    if "scorer" not in files:
        return
    scorer = open_session(arguments.artifact / files["scorer"], arguments.threads)
    for rows, size in SHAPES[:-1]:
        for alignment in (False, True):
            median, least = time_scorer(scorer, manifest["state"], rows, size, alignment)
            what = "and alignments" if alignment else ""
            out.write(f"scorer, {rows:3d} rows of {size:3d} tokens: {median:8.2f} ({least:.2f}) {what}\n")


if __name__ == "__main__":
    main()
