"""Times an artifact's graphs on the CPU: `python -m export.benchmark ARTIFACT [--threads 1] [--variant cpu]`.

State is bound in place as the service binds it. Prints the median and the least of many runs: on a machine that does
other work, the least is nearer to what the graph costs. Of graphs with products of integers it also tells which share
a step reaches of the best rate at which ONNX Runtime multiplies integers here, in steps and products by turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from export.artifact_decoder import ELEMENT_TYPES, open_session
from export.graph_file import Port, trace
from export.ops import integer_product

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
    types = {port.name: ELEMENT_TYPES.get(port.type) for port in session.get_inputs()}
    found = {}
    for tensor in state:
        kind = types[tensor["name"]]
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor["shape"]]
        found[tensor["name"]] = (rng.normal(size=shape) * (16 if kind is np.int8 else 1)).astype(kind)
    return found


def multiplications(path: Path) -> int:
    """Of integers, for each row of a decoder step: the weights of its products."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    for node in graph.node:  # an embedding that is the output projection too
        if node.op_type == "Transpose" and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
    return sum(sizes[node.input[1]] for node in graph.node if node.op_type == "MatMulIntegerToFloat")


class _Product(nn.Module):
    """One product of integers by itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.randint(-127, 128, (inputs, outputs), dtype=torch.int8))
        self.scales = nn.Buffer(torch.full((outputs,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """x (M, K) uint8 -> (M, N) float32."""
        return integer_product(x, self.weight, torch.tensor(0.02), self.scales, 128)


def product(rows: int, inputs: int, outputs: int, threads: int) -> Callable[[], object]:
    """Of (rows, inputs) and (inputs, outputs), ready to run."""
    x = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    graph = trace(_Product(inputs, outputs), [(Port("x", (rows, inputs)), x)], [Port("y", (rows, outputs))])
    session = open_session(graph.SerializeToString(), threads)
    feeds = {"x": x.numpy()}
    return lambda: session.run(None, feeds)


def share_of_peak(
    session: onnxruntime.InferenceSession, state: list[dict[str, Any]], each: int, rows: int, threads: int
) -> tuple[float, float]:
    """The best rate of integer products, in 10^9 multiplications a second, and the share that a step of rows has of it.

    `each`: the multiplications of a row. Medians of five turns.
    """
    shapes = ((256, 512, 2048), (512, 512, 2048), (256, 1024, 1024), (512, 2048, 512))
    products = [(math.prod(shape), product(*shape, threads)) for shape in shapes]
    rates, shares = [], []
    for _ in range(5):
        rate = max(count / milliseconds(run, 20)[0] for count, run in products) / 1e6
        rates.append(rate)
        shares.append(each * rows / time_step(session, state, rows, 1)[0] / 1e6 / rate)
    return statistics.median(rates), statistics.median(shares)


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
    if each := multiplications(arguments.artifact / files["decoder"]):
        for rows in ROWS[-2:]:
            rate, share = share_of_peak(decoder, manifest["state"], each, rows, arguments.threads)
            out.write(
                f"decoder step, {rows:3d} rows: {each * rows / 1e9:.3f} 10^9 multiplications of integers, "
                f"{share:.0%} of the best rate of {rate:.0f} 10^9/s\n"
            )
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
        if size > manifest["max_target_tokens"]:
            continue
        for alignment in (False, True):
            median, least = time_scorer(scorer, manifest["state"], rows, size, alignment)
            what = "and alignments" if alignment else ""
            out.write(f"scorer, {rows:3d} rows of {size:3d} tokens: {median:8.2f} ({least:.2f}) {what}\n")


if __name__ == "__main__":
    main()
