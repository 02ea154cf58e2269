"""Do the graphs take and give what the manifest says? Reads sessions' signatures; runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from service.artifact import Manifest, StateTensor
from service.errors import ArtifactError

ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
}
"""ONNX Runtime's words for the element types that a state may have."""

_FLOAT, _INT = np.dtype(np.float32), np.dtype(np.int64)


class Port(Protocol):
    """An input or output of a graph."""

    name: str
    type: str
    shape: list[int | str | None]


class Graph(Protocol):
    """What is asked of a session here."""

    def get_inputs(self) -> list[Port]:
        """In order."""

    def get_outputs(self) -> list[Port]:
        """In order."""


def check_decoder(graph: Graph, manifest: Manifest, path: Path) -> dict[str, np.dtype[Any]]:
    """The element type of each state tensor, as the decoder reads it. Raises ArtifactError."""
    inputs, outputs = _ports(graph.get_inputs()), _ports(graph.get_outputs())
    state = {tensor.name: tensor for tensor in manifest.state}
    _expect_names(set(inputs), {"last_ids", "positions", "source_lengths", "k", *state}, path, "inputs")
    for name in ("last_ids", "positions", "source_lengths"):
        _expect(inputs[name], _INT, [None], path)
    _expect(inputs["k"], _INT, [], path)
    types = {name: _state_type(inputs[name], path) for name in state}
    for name, tensor in state.items():
        _expect(inputs[name], types[name], _sizes(tensor), path)
    written = {f"next_{tensor.name}" for tensor in manifest.state if tensor.kind != "source"}
    allowed = {"candidate_ids", "candidate_scores", "logits"} | {f"next_{name}" for name in state}
    _expect_names(
        set(outputs) & allowed,
        {"candidate_ids", "candidate_scores", "logits"} | written,
        path,
        "outputs",
        exactly=False,
    )
    _expect_names(set(outputs), allowed & set(outputs), path, "outputs")
    _expect(outputs["candidate_ids"], _INT, [None, None], path)
    _expect(outputs["candidate_scores"], _FLOAT, [None, None], path)
    _expect(outputs["logits"], _FLOAT, [None, manifest.vocab_size], path)
    for name, tensor in state.items():
        if f"next_{name}" in outputs:
            _expect(outputs[f"next_{name}"], types[name], _sizes(tensor), path)
    return types


def check_encoder(graph: Graph, manifest: Manifest, types: dict[str, np.dtype[Any]], path: Path) -> None:
    """Raises ArtifactError."""
    inputs, outputs = _ports(graph.get_inputs()), _ports(graph.get_outputs())
    _expect_names(set(inputs), {"source_ids", "source_lengths", "source_capacity"}, path, "inputs")
    _expect(inputs["source_ids"], _INT, [None, None], path)
    _expect(inputs["source_lengths"], _INT, [None], path)
    _expect(inputs["source_capacity"], _INT, [], path)
    sources = [tensor for tensor in manifest.state if tensor.kind == "source"]
    labels = {"label_logits"} if manifest.labels else set()
    _expect_names(set(outputs), {"memory", *labels, *(tensor.name for tensor in sources)}, path, "outputs")
    if labels:
        _expect(outputs["label_logits"], _FLOAT, [None, None, len(manifest.labels)], path)
    _expect(outputs["memory"], _FLOAT, [None, None, manifest.embedding_size], path)
    for tensor in sources:
        _expect(outputs[tensor.name], types[tensor.name], _sizes(tensor), path)


def check_scorer(graph: Graph, manifest: Manifest, types: dict[str, np.dtype[Any]], path: Path) -> None:
    """Raises ArtifactError."""
    inputs, outputs = _ports(graph.get_inputs()), _ports(graph.get_outputs())
    sources = [tensor for tensor in manifest.state if tensor.kind == "source"]
    _expect_names(set(inputs), {"target_ids", "source_lengths", *(tensor.name for tensor in sources)}, path, "inputs")
    _expect(inputs["target_ids"], _INT, [None, None], path)
    _expect(inputs["source_lengths"], _INT, [None], path)
    for tensor in sources:
        _expect(inputs[tensor.name], types[tensor.name], _sizes(tensor), path)
    aligned = {"alignment"} if manifest.alignment_layer is not None else set()
    _expect_names(set(outputs), {"log_probabilities", *aligned}, path, "outputs")
    _expect(outputs["log_probabilities"], _FLOAT, [None, None], path)
    if aligned:
        _expect(outputs["alignment"], _FLOAT, [None, None, None], path)


def check_reorder(graph: Graph, manifest: Manifest, path: Path) -> None:
    """Raises ArtifactError."""
    names = {tensor.name for tensor in manifest.state}
    _expect_names(set(_ports(graph.get_inputs())), {"rows_from", *names}, path, "inputs")
    _expect_names(set(_ports(graph.get_outputs())), {f"next_{name}" for name in names}, path, "outputs")


def _ports(ports: list[Port]) -> dict[str, Port]:
    return {port.name: port for port in ports}


def _sizes(tensor: StateTensor) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in tensor.shape]


def _state_type(port: Port, path: Path) -> np.dtype[Any]:
    if port.type not in ELEMENT_TYPES:
        _disagree(path, f"{port.name} has the element type {port.type}, which no state may have")
    return ELEMENT_TYPES[port.type]


def _expect_names(found: set[str], wanted: set[str], path: Path, what: str, *, exactly: bool = True) -> None:
    if missing := sorted(wanted - found):
        _disagree(path, f"{what} that the manifest wants are not there: {', '.join(missing)}")
    if exactly and (surplus := sorted(found - wanted)):
        _disagree(path, f"{what} that the manifest does not know: {', '.join(surplus)}")


def _expect(port: Port, dtype: np.dtype[Any], sizes: list[int | None], path: Path) -> None:
    """`sizes`: None where any length will do. The graph may leave a length open that the manifest fixes."""
    if ELEMENT_TYPES.get(port.type) != dtype:
        _disagree(path, f"{port.name} is {port.type}, not {dtype.name}")
    fits = len(port.shape) == len(sizes) and all(
        not isinstance(found, int) or found == wanted for found, wanted in zip(port.shape, sizes, strict=True)
    )
    if not fits:
        _disagree(path, f"{port.name} has the shape {port.shape}, not {sizes} (None: any length)")


def _disagree(path: Path, how: str) -> NoReturn:
    raise ArtifactError(f"{path} and the manifest disagree: {how}. Export the model again with: transduce export.")


_PRODUCTS = frozenset(
    {"MatMul", "Gemm", "MatMulIntegerToFloat", "Attention", "GroupQueryAttention", "MultiHeadAttention"}
)
"""The operators that a model's time goes into. Shapes and the like may be computed on the host."""


def products_on(provider: str, session: Any) -> list[str]:
    """The products and attentions of a graph that ONNX Runtime gave to this provider, by operator and node.

    The session must have been opened with `session.record_ep_graph_assignment_info`.
    """
    return [
        f"{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == provider
        for node in part.get_nodes()
        if node.op_type in _PRODUCTS
    ]
