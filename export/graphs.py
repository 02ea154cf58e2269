"""The graphs of one variant of an artifact, with the names and axes of the artifact's contract."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from export.decoder_graph import DecoderGraph, state_names
from export.encoder_graph import EncoderGraph
from export.equalisation import equalise
from export.graph_file import Port, save, store_matrices, trace
from export.profile import Profile
from export.scorer_graph import ScorerGraph
from model.config import TransformerConfig
from model.transformer import Transformer


def state_tensors(config: TransformerConfig) -> list[dict[str, object]]:
    """The manifest's description of the decoder's state: name, kind and shape of each tensor, in the graphs' order."""
    state: list[dict[str, object]] = []
    for layer in range(config.decoder_layers):
        for name in state_names(layer):
            kind, capacity = ("cache", "target_capacity") if name.startswith("self") else ("source", "source_capacity")
            state.append({"name": name, "kind": kind, "shape": ["rows", config.num_heads, capacity, config.d_head]})
    return state


def _state_ports(config: TransformerConfig) -> list[Port]:
    ports = []
    for tensor in state_tensors(config):
        shape = tensor["shape"]
        assert isinstance(shape, list)
        ports.append(Port(str(tensor["name"]), tuple(shape)))
    return ports


class ReorderGraph(nn.Module):
    """Rows of every state tensor picked anew, for beams that follow other beams."""

    def forward(self, rows_from: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """rows_from (n,) int64, state tensors of rows on axis 0 -> the same tensors, row i taken from rows_from[i]."""
        return tuple(tensor.index_select(0, rows_from) for tensor in state)


def write_encoder(model: Transformer, profile: Profile, path: Path) -> None:
    """Export the encoder of a variant to a file."""
    config, profile = model.config, profile.for_heads(model.config.d_head)
    inputs = [
        (Port("source_ids", ("rows", "source")), torch.zeros(3, 5, dtype=torch.int64)),
        (Port("source_lengths", ("rows",)), torch.ones(3, dtype=torch.int64)),
        (Port("source_capacity", ()), torch.tensor(8)),
    ]
    outputs = [Port("memory", ("rows", "source", config.d_model))]
    outputs += [port for port in _state_ports(config) if "source_capacity" in port.axes]
    graph = trace(EncoderGraph(_with_arithmetic(model, profile), profile), inputs, outputs)
    store_matrices(graph, profile.stored)
    save(graph, path)


def write_decoder(model: Transformer, profile: Profile, path: Path) -> None:
    """Export one step of the decoder of a variant to a file."""
    config, ports = model.config, _state_ports(model.config)
    profile = profile.for_heads(config.d_head)
    inputs = [
        (Port(name, ("rows",)), torch.ones(3, dtype=torch.int64))
        for name in ("last_ids", "positions", "source_lengths")
    ]
    inputs.append((Port("k", ()), torch.tensor(4)))
    inputs += [(port, _example_state(port, profile)) for port in ports]
    outputs = [
        Port("candidate_ids", ("rows", "k")),
        Port("candidate_scores", ("rows", "k")),
        Port("logits", ("rows", config.vocab_size)),
    ]
    rewritten = profile.cross_attention == "rewriting" or profile.integer_state
    outputs += [Port(f"next_{port.name}", port.axes) for port in ports if rewritten or "target_capacity" in port.axes]
    graph = trace(DecoderGraph(_with_arithmetic(model, profile), profile), inputs, outputs)
    store_matrices(graph, profile.stored)
    save(graph, path, lends=not profile.integer_weights)  # bytes lie anywhere


def write_scorer(model: Transformer, profile: Profile, alignment_layer: int, decoder: Path, path: Path) -> None:
    """Export the reading of whole targets of a variant to a file beside its decoder, whose weights it uses."""
    config, profile = model.config, profile.for_heads(model.config.d_head)
    ports = [port for port in _state_ports(config) if "source_capacity" in port.axes]
    inputs = [
        (Port("target_ids", ("rows", "target")), torch.ones(3, 5, dtype=torch.int64)),
        (Port("source_lengths", ("rows",)), torch.ones(3, dtype=torch.int64)),
    ]
    inputs += [(port, _example_state(port, profile)) for port in ports]
    outputs = [
        Port("log_probabilities", ("rows", "target")),
        Port("alignment", ("rows", "target", "source_capacity")),
    ]
    graph = trace(ScorerGraph(_with_arithmetic(model, profile), profile, alignment_layer), inputs, outputs)
    store_matrices(graph, profile.stored)
    save(graph, path, weights_in=decoder)


def write_reorder(config: TransformerConfig, profile: Profile, path: Path) -> None:
    """Export the picking of rows, for providers whose state does not lie in the host's memory."""
    ports = _state_ports(config)
    inputs = [(Port("rows_from", ("picked",)), torch.zeros(2, dtype=torch.int64))]
    inputs += [(port, _example_state(port, profile)) for port in ports]
    save(trace(ReorderGraph(), inputs, [Port(f"next_{port.name}", ("picked", *port.axes[1:])) for port in ports]), path)


def _with_arithmetic(model: Transformer, profile: Profile) -> Transformer:
    copied = copy.deepcopy(model).eval()
    return (equalise(copied) if profile.integer_products else copied).to(profile.arithmetic)


def _example_state(port: Port, profile: Profile) -> Tensor:
    sizes = {"rows": 3, "target_capacity": 7, "source_capacity": 9}
    element = torch.int8 if profile.integer_state else profile.arithmetic
    return torch.zeros([axis if isinstance(axis, int) else sizes[axis] for axis in port.axes], dtype=element)
