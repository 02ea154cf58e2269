"""The floor of a decoder step: what has to be read from the device's memory, over its bandwidth.

Counts the matrices of the decoder once, and of the state the positions in use. Knows the transformer of `model/` by the
manifest's `architecture`; of other architectures it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.artifact import Manifest, VariantName
from service.runner import Runner
from tests.benchmarks.gpu.sessions import row_bytes

_WEIGHT_BYTES = {("cuda", "fp32"): 4, ("cuda", "fp16"): 2, ("cpu", "fp32"): 4, ("cpu", "fp16"): 4, ("cpu", "int8"): 1}
"""Of an element in a product, by variant and precision."""


@dataclass(frozen=True)
class Floor:
    """Of one step."""

    weight_bytes: int | None
    state_bytes: int
    milliseconds: float | None
    """None if the architecture or the bandwidth is not known."""


def floor_of(runner: Runner, *, rows: int, source: int, target: float, bandwidth: float | None) -> Floor:
    """With so many rows, of sources of so many tokens, at this target position on average."""
    weights = weight_bytes(runner.manifest, runner.variant)
    state = rows * state_bytes(runner, source=source, target=target)
    if weights is None or bandwidth is None:
        return Floor(weights, state, None)
    return Floor(weights, state, 1e3 * (weights + state) / bandwidth)


def decoder_elements(manifest: Manifest) -> int | None:
    """Elements of the matrices that a step multiplies by; None for an architecture that is not known here."""
    try:
        names = ("d_model", "decoder_layers", "d_ff", "vocab_size")
        width, layers, inner, vocabulary = (int(manifest.architecture[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        return None
    # Query, key, value and output of self-attention, query and output of cross-attention, two of the feed-forward.
    return layers * (6 * width * width + 2 * width * (inner or 4 * width)) + vocabulary * width


def weight_bytes(manifest: Manifest, variant: VariantName) -> int | None:
    """Bytes of these matrices as a step reads them; the file may hold them smaller."""
    size = _WEIGHT_BYTES.get((variant, manifest.variants[variant].precision))
    elements = decoder_elements(manifest)
    return None if elements is None or size is None else elements * size


def state_bytes(runner: Runner, *, source: int, target: float) -> int:
    """Bytes of a row's state that a step reads and writes, a position of each cache being written."""
    total = 0.0
    for tensor, dtype in runner.tensors:
        if tensor.kind == "source":
            total += row_bytes(tensor, dtype, source=source, target=0)
        elif tensor.kind == "cache":
            total += row_bytes(tensor, dtype, source=0, target=1) * (target + 2)  # read with the new one, written
        else:
            total += 2 * row_bytes(tensor, dtype, source=0, target=0)
    return round(total)
