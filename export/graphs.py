"""The graphs of one variant of an artifact, with the names and axes of the artifact's contract."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from export.decoder_graph import DecoderGraph
from export.encoder_graph import EncoderGraph
from export.equalisation import equalise
from export.graph_file import Port, save, store_matrices, trace
from export.profile import Profile
from export.scorer_graph import ScorerGraph
from export.state import StateTensor, state_of
from model.config import TransformerConfig
from model.transformer import Transformer


def _port(tensor: StateTensor) -> Port:
    return Port(tensor.name, tensor.shape)


class ReorderGraph(nn.Module):
    """Rows of every state tensor picked anew, for beams that follow other beams."""

    def forward(self, rows_from: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """rows_from (n,) int64, state tensors of rows on axis 0 -> the same tensors, row i taken from rows_from[i]."""
        return tuple(tensor.index_select(0, rows_from) for tensor in state)


def write_encoder(model: Transformer, profile: Profile, path: Path) -> None:
    """Export the encoder of a variant to a file."""
    config, profile = model.config, profile.fitting(model.config)
    inputs = [
        (Port("source_ids", ("rows", "source")), torch.zeros(3, 5, dtype=torch.int64)),
        (Port("source_lengths", ("rows",)), torch.ones(3, dtype=torch.int64)),
        (Port("source_capacity", ()), torch.tensor(8)),
    ]
    outputs = [Port("memory", ("rows", "source", config.d_model))]
    if config.labels:
        outputs.append(Port("label_logits", ("rows", "source", len(config.labels))))
    outputs += [_port(tensor) for tensor in state_of(config) if tensor.kind == "source"]
    graph = trace(EncoderGraph(_with_arithmetic(model, profile), profile), inputs, outputs)
    store_matrices(graph, profile.stored)
    save(graph, path)


def write_decoder(model: Transformer, profile: Profile, path: Path) -> None:
    """Export one step of the decoder of a variant to a file."""
    config, state = model.config, state_of(model.config)
    profile = profile.fitting(config)
    inputs = [
        (Port(name, ("rows",)), torch.ones(3, dtype=torch.int64))
        for name in ("last_ids", "positions", "source_lengths")
    ]
    inputs.append((Port("k", ()), torch.tensor(4)))
    inputs += [(_port(tensor), _example_state(tensor, profile)) for tensor in state]
    outputs = [
        Port("candidate_ids", ("rows", "k")),
        Port("candidate_scores", ("rows", "k")),
        Port("logits", ("rows", config.vocab_size)),
    ]
    rewritten = profile.cross_attention == "rewriting" or profile.integer_state
    outputs += [Port(f"next_{tensor.name}", tensor.shape) for tensor in state if rewritten or tensor.kind != "source"]
    graph = trace(DecoderGraph(_with_arithmetic(model, profile), profile), inputs, outputs)
    store_matrices(graph, profile.stored)
    save(graph, path, lends=not profile.integer_weights)  # bytes lie anywhere


def write_scorer(model: Transformer, profile: Profile, alignment_layer: int, decoder: Path, path: Path) -> None:
    """Export the reading of whole targets of a variant to a file beside its decoder, whose weights it uses."""
    config, profile = model.config, profile.fitting(model.config)
    state = [tensor for tensor in state_of(config) if tensor.kind == "source"]
    inputs = [
        (Port("target_ids", ("rows", "target")), torch.ones(3, 5, dtype=torch.int64)),
        (Port("source_lengths", ("rows",)), torch.ones(3, dtype=torch.int64)),
    ]
    inputs += [(_port(tensor), _example_state(tensor, profile)) for tensor in state]
    outputs = [
        Port("log_probabilities", ("rows", "target")),
        Port("alignment", ("rows", "target", "source_capacity")),
    ]
    graph = trace(ScorerGraph(_with_arithmetic(model, profile), profile, alignment_layer), inputs, outputs)
    store_matrices(graph, profile.stored)
    save(graph, path, weights_in=decoder)


def write_reorder(config: TransformerConfig, profile: Profile, path: Path) -> None:
    """Export the picking of rows, for providers whose state does not lie in the host's memory."""
    state = state_of(config)
    inputs = [(Port("rows_from", ("picked",)), torch.zeros(2, dtype=torch.int64))]
    inputs += [(_port(tensor), _example_state(tensor, profile)) for tensor in state]
    outputs = [Port(f"next_{tensor.name}", ("picked", *tensor.shape[1:])) for tensor in state]
    save(trace(ReorderGraph(), inputs, outputs), path)


def _with_arithmetic(model: Transformer, profile: Profile) -> Transformer:
    copied = copy.deepcopy(model).eval()
    return (equalise(copied) if profile.integer_products else copied).to(profile.arithmetic)


def _example_state(tensor: StateTensor, profile: Profile) -> Tensor:
    sizes = {"rows": 3, "target_capacity": 7, "source_capacity": 9}
    element = profile.arithmetic
    if tensor.kind == "recurrent":
        element = torch.float32  # sums of a whole text
    elif profile.integer_state and tensor.has_capacity:
        element = torch.int8
    return torch.zeros([axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape], dtype=element)
