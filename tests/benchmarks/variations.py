"""What the kinds of attention cost: encoding against the source's length, a decoder step against the target's.

    python -m tests.benchmarks.variations --work DIR [--lengths 128 512 ...] [--positions 64 ...] [--rounds 5]

Models of random weights, in fp32, one thread. Every measurement of an encoder is a process of its own, so that its peak
memory is its own; kinds take turns. Writes DIR/variations.json, .md and .png, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from export.artifact_decoder import open_session
from export.graphs import write_decoder, write_encoder
from export.profile import CPU
from export.state import state_of
from model.config import TransformerConfig
from model.transformer import Transformer

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"encoder_attention": "window", "decoder_attention": "window"},
    "linear": {"encoder_attention": "linear", "decoder_attention": "linear"},
    "performer": {"encoder_attention": "performer", "decoder_attention": "linear"},
}
"""The encoder's window is 256 positions with one global token, the decoder's 64."""

LENGTHS = (128, 512, 2048, 4096, 8192, 16384)
POSITIONS = (64, 256, 1024, 4096)
ROWS = 16
"""Of a decoder step."""
SOURCE = 32
"""Source tokens of each of these rows."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--one", nargs=2, metavar=("KIND", "LENGTH"), help="measure one encoder; for this program's use"
    )
    arguments = parser.parse_args()
    if arguments.one:
        kind, length = arguments.one
        print(json.dumps(encode(arguments.work / kind, int(length))))
        return 0
    for kind, changes in KINDS.items():
        export(arguments.work / kind, changes, max(arguments.lengths), max(arguments.positions))
    found = {
        "encode": encodings(arguments.work, arguments.lengths, arguments.rounds),
        "step": {kind: steps(arguments.work / kind, kind, arguments.positions, arguments.rounds) for kind in KINDS},
    }
    (arguments.work / "variations.json").write_text(json.dumps(found, indent=1))
    text = tables(found)
    (arguments.work / "variations.md").write_text(text)
    draw(found, arguments.work / "variations.png")
    print(text)
    return 0


def config_of(changes: dict[str, Any], longest_source: int, longest_target: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=8000,
        d_model=256,
        num_heads=4,
        encoder_layers=4,
        decoder_layers=2,
        pre_norm=True,
        max_source_tokens=longest_source,
        max_target_tokens=longest_target,
        **changes,
    )


def export(directory: Path, changes: dict[str, Any], longest_source: int, longest_target: int) -> None:
    """Encoder and decoder of random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Transformer(config_of(changes, longest_source, longest_target)).eval()
    write_encoder(model, CPU["fp32"], directory / "encoder.onnx")
    write_decoder(model, CPU["fp32"], directory / "decoder.onnx")


def encodings(work: Path, lengths: list[int], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each kind and length the median seconds and the peak memory in MiB, above that of the loaded graph."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {kind: {} for kind in KINDS}
    for length in lengths:
        for _ in range(rounds):
            for kind in KINDS:
                command = [sys.executable, "-m", "tests.benchmarks.variations", "--work", str(work)]
                outcome = subprocess.run(
                    [*command, "--one", kind, str(length)], check=True, capture_output=True, text=True
                )
                found[kind].setdefault(str(length), []).append(json.loads(outcome.stdout))
    return {
        kind: {
            length: {name: statistics.median(run[name] for run in runs) for name in ("seconds", "mebibytes")}
            for length, runs in by_length.items()
        }
        for kind, by_length in found.items()
    }


def encode(directory: Path, length: int) -> dict[str, float]:
    """One source of this length, in this process: seconds and peak memory of an encoding without a decoder's keys."""
    session = open_session(directory / "encoder.onnx", threads=1)
    ids = np.random.default_rng(0).integers(3, 8000, (1, length))
    feeds = {"source_ids": ids, "source_lengths": np.array([length]), "source_capacity": np.array(length)}
    session.run(["memory"], {**feeds, "source_ids": ids[:, :8], "source_lengths": np.array([8])})
    # Loading torch and the graph took more memory than an encoding of a short source does: the peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    began = time.perf_counter()
    session.run(["memory"], feeds)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mebibytes": _resident("VmHWM") - before}


def _resident(field: str) -> float:
    """MiB of this process's memory, now (VmRSS) or at the peak (VmHWM); of Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.M)[0]) / 1024


def steps(directory: Path, kind: str, positions: list[int], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of all rows at each position, with state in place and no more capacity."""
    config = config_of(KINDS[kind], 16, max(positions))
    session = open_session(directory / "decoder.onnx", threads=1)
    found = {}
    for position in positions:
        binding = _bound(session, config, position)
        for _ in range(3):
            session.run_with_iobinding(binding)
        times = []
        for _ in range(20 * rounds):
            began = time.perf_counter()
            session.run_with_iobinding(binding)
            times.append(time.perf_counter() - began)
        found[str(position)] = 1000 * statistics.median(times)
    return found


def _bound(session: ort.InferenceSession, config: TransformerConfig, position: int) -> ort.IOBinding:
    binding = session.io_binding()
    for name, value in (("last_ids", 7), ("positions", position - 1), ("source_lengths", SOURCE)):
        binding.bind_cpu_input(name, np.full(ROWS, value, np.int64))
    binding.bind_cpu_input("k", np.array(1))
    written = {port.name for port in session.get_outputs()}
    sizes = {"rows": ROWS, "source_capacity": SOURCE, "target_capacity": position}
    rng = np.random.default_rng(0)
    for tensor in state_of(config):
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
        contents = np.abs(rng.standard_normal(shape, np.float32))
        value = ort.OrtValue.ortvalue_from_numpy(contents)
        binding.bind_ortvalue_input(tensor.name, value)
        if f"next_{tensor.name}" in written:
            binding.bind_ortvalue_output(f"next_{tensor.name}", value)
    for name in ("candidate_ids", "candidate_scores"):
        binding.bind_output(name)
    return binding


def tables(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [f"| source tokens | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for length in found["encode"]["full"]:
        cells = (found["encode"][kind][length] for kind in KINDS)
        lines.append(
            f"| {int(length):,} | "
            + " | ".join(f"{1000 * c['seconds']:,.0f} ms, {c['mebibytes']:,.0f} MiB" for c in cells)
            + " |"
        )
    lines += ["", f"| position | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for position in found["step"]["full"]:
        steps_ = (found["step"][kind][position] for kind in KINDS)
        lines.append(f"| {int(position):,} | " + " | ".join(f"{1000 * ms / ROWS:,.0f} us" for ms in steps_) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels: time and memory of encoding, cost of a token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    seconds, memory, step = figure.subplots(1, 3)
    for kind in KINDS:
        by_length = found["encode"][kind]
        lengths = [int(length) for length in by_length]
        seconds.plot(lengths, [1000 * one["seconds"] for one in by_length.values()], marker="o", label=kind)
        memory.plot(lengths, [one["mebibytes"] for one in by_length.values()], marker="o", label=kind)
        by_position = found["step"][kind]
        costs = [1000 * ms / ROWS for ms in by_position.values()]
        step.plot([int(position) for position in by_position], costs, marker="o", label=kind)
    for axes, x, y in (
        (seconds, "source tokens", "encoding, ms"),
        (memory, "source tokens", "peak memory of encoding, MiB"),
        (step, "target position", f"a token of {ROWS} rows' step, us"),
    ):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.legend()
    step.set_ylim(bottom=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
