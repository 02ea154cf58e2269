"""From a torch module to an ONNX graph with named axes, and from there to a small file.

Knows tensors and files; not what the graphs compute.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 24
SMALLEST_MATRIX = 1024
"""Elements from which a matrix is worth storing in a smaller type, or once for two graphs."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its name, and its axes as numbers or symbols."""

    name: str
    axes: tuple[int | str, ...]


def trace(module: nn.Module, inputs: Sequence[tuple[Port, Tensor]], outputs: Sequence[Port]) -> onnx.ModelProto:
    """Export a module in evaluation mode, called with the example tensors. Symbolic axes become dynamic."""
    ports = [port for port, _ in inputs]
    examples = tuple(tensor for _, tensor in inputs)
    shapes = [
        {n: torch.export.Dim.DYNAMIC for n, axis in enumerate(port.axes) if isinstance(axis, str)} for port in ports
    ]
    # The signature's *state, if there is one, stands for all the inputs after the named ones.
    named = module.forward.__code__.co_argcount - 1
    dynamic = tuple(shapes[:named]) + ((tuple(shapes[named:]),) if len(shapes) > named else ())
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=[port.name for port in ports],
            output_names=[port.name for port in outputs],
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    _name_axes(model.graph.input, ports)
    _name_axes(model.graph.output, outputs)
    _strip(model)
    _drop_unused_outputs(model)
    _merge_equal_weights(model)
    _read_integers_apart(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of what is not installed and of its own deprecations; nothing of it concerns the user."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _name_axes(values: Sequence[onnx.ValueInfoProto], ports: Sequence[Port]) -> None:
    """Declare the ports' axes: the exporter's symbols say nothing, and it does not know what our operators give."""
    if [value.name for value in values] != [port.name for port in ports]:
        raise RuntimeError(f"graph has {[value.name for value in values]}, expected {[port.name for port in ports]}")
    for value, port in zip(values, ports, strict=True):
        element_type = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(port.name, element_type, list(port.axes)))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what only describes the machine and source it was exported from, and the exporter's guesses of shapes."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    graph.ClearField("value_info")
    model.producer_name, model.producer_version = "transduce", ""


def _drop_unused_outputs(model: onnx.ModelProto) -> None:
    """Take the name from outputs that nothing reads, so that an operator need not compute what is optional.

    Of ONNX Runtime's own operators: of those that the graphs use, no other has optional outputs.
    """
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if node.domain and name not in used:
                node.output[place] = ""
        while node.output and node.output[-1] == "":
            node.output.pop()


def _merge_equal_weights(model: onnx.ModelProto) -> None:
    """Store equal initializers once, such as a matrix that is both embedding and output projection."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for tensor in model.graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        if key in first:
            renamed[tensor.name] = first[key]
        else:
            first[key] = tensor.name
            kept.append(tensor)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    _replace_initializers(model, kept)


def _read_integers_apart(model: onnx.ModelProto) -> None:
    """Let no two products of integers read one matrix, as those of shared layers would: for a processor without VNNI
    ONNX Runtime makes bytes without a sign of it, and fails where it has done so before ("Attempt to replace the
    existing tensor", 1.32). A slice of all its rows is another matrix by then, and the file still holds it once.
    """
    readers: Counter[str] = Counter()
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            weight = node.input[1]
            readers[weight] += 1
            if (reader := readers[weight]) > 1:
                # Slices with the same end would become one; beyond the last row an end changes nothing.
                own, end = f"{weight}.{reader}", f"end.{reader}"
                nodes.append(helper.make_node("Slice", [weight, "zero", end, "zero"], [own]))
                node.input[1] = own
        nodes.append(node)
    if not readers or (most := max(readers.values())) == 1:
        return
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    model.graph.ClearField("node")
    model.graph.node.extend(kept)
    ends = {"zero": 0} | {f"end.{reader}": _BEYOND_ROWS + reader for reader in range(2, most + 1)}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([at]), name) for name, at in ends.items())


_BEYOND_ROWS = 2**32


def _replace_initializers(model: onnx.ModelProto, tensors: Sequence[TensorProto]) -> None:
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)


def store_matrices(model: onnx.ModelProto, stored: Literal["float32", "float16", "int8"]) -> None:
    """Store the floating-point matrices in a smaller type, and expand them in the graph.

    ONNX Runtime folds the expansion when it loads the file, so nothing of it is left in a run. float16 rounds; int8 has
    a scale per row, which is an output of a linear layer or a token of an embedding.
    """
    floating = (TensorProto.FLOAT, TensorProto.FLOAT16)
    tensors, nodes = [], []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        small = tensor.data_type not in floating or values.ndim != 2 or values.size < SMALLEST_MATRIX
        if small or stored == "float32" or (stored == "float16" and tensor.data_type == TensorProto.FLOAT16):
            tensors.append(tensor)
            continue
        name = tensor.name
        if stored == "float16":
            tensors.append(numpy_helper.from_array(values.astype(np.float16), f"{name}.float16"))
            nodes.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=tensor.data_type))
            continue
        wide = values.astype(np.float32)
        scale = np.maximum(np.abs(wide).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-12))
        tensors.append(
            numpy_helper.from_array(np.clip(np.rint(wide / scale), -127, 127).astype(np.int8), f"{name}.int8")
        )
        tensors.append(numpy_helper.from_array(scale, f"{name}.scale"))
        nodes.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.integers"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.integers", f"{name}.scale"], [f"{name}.float32"]))
        nodes.append(helper.make_node("Cast", [f"{name}.float32"], [name], to=tensor.data_type))
    _replace_initializers(model, tensors)
    following = list(model.graph.node)
    model.graph.ClearField("node")
    model.graph.node.extend([*nodes, *following])


def save(model: onnx.ModelProto, path: Path, *, weights_in: Path | None = None, lends: bool = False) -> None:
    """Check the model and write it as one file, weights inside.

    Matrices that stand in `weights_in`, a file in the same directory, byte for byte, are not stored again: the graph
    says where in that file they are. A file that `lends` has its float matrices at places where they can be used so.
    """
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    if weights_in is not None:
        _refer_to(weights_in, model)
    if lends:
        _align_matrices(model)
    onnx.save_model(model, path)


def _refer_to(lender: Path, model: onnx.ModelProto) -> None:
    """Replace matrices by their places in another file. ONNX Runtime maps them from there, where they must be aligned
    to their elements: a matrix that is not, is stored.
    """
    content = lender.read_bytes()
    for tensor in model.graph.initializer:
        if not _is_matrix(tensor):
            continue
        offset = content.find(tensor.raw_data)
        if offset < 0 or offset % _element_size(tensor):
            continue
        place = {"location": lender.name, "offset": offset, "length": len(tensor.raw_data)}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))


def _align_matrices(model: onnx.ModelProto) -> None:
    """Let every matrix begin, in the file, at a multiple of its element's size.

    Protobuf has no padding, so blanks in the note on the tensor before do it; one that is no matrix stands first.
    """
    tensors = sorted(model.graph.initializer, key=_is_matrix)
    _replace_initializers(model, tensors)
    for tensor in model.graph.initializer:
        tensor.doc_string = ""  # takes its two bytes now, so that each blank adds one
    moved = 1
    while moved:  # again only if blanks made a length longer that is itself written in front
        content, moved = model.SerializeToString(), 0
        for before, tensor in pairwise(model.graph.initializer):
            if _is_matrix(tensor):
                blanks = -(content.index(tensor.raw_data) + moved) % _element_size(tensor)
                before.doc_string += " " * blanks
                moved += blanks


def _is_matrix(tensor: TensorProto) -> bool:
    """Whether it is worth storing once for two graphs."""
    return len(tensor.raw_data) >= SMALLEST_MATRIX * _element_size(tensor)


def _element_size(tensor: TensorProto) -> int:
    return helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
