"""A model that computes the same, but whose features go equally far where one scale quantises all of them.

Where features of a product's input differ in size, one scale gives most of its integers to the largest. A factor of a
feature can be moved over a linear step without a trace in the result: so what gives the features makes them equally
large, and the weights that read them, which have a scale for each output, take the difference. This is the
equalisation of Nagel et al. (2019), "Data-Free Quantization Through Weight Equalization and Bias Correction", with all
of the difference on the side of the weights.
"""

from __future__ import annotations

import torch
from torch import nn

from export.integer_state import HEADS_DEVIATIONS
from export.layers import SMALLEST_SCALE
from export.spread import Activations, decoder_residuals, encoder_residuals, memory_of, read_by
from model.attention import MultiHeadAttention
from model.transformer import DecoderLayer, EncoderLayer, Residual, Transformer

LARGEST_RATIO = 1e6
"""A feature that hardly moves is made no more than so much larger: what it is then multiplied by stays a number."""


@torch.no_grad()
def equalise(model: Transformer) -> Transformer:
    """Changes the model, and returns it: its answers are as before, but for rounding."""
    reads = read_by(model.source_embedding, encoder_residuals(model))
    for number, layer in enumerate(model.encoder_stack):
        _even_sublayers(layer, reads[2 * number])
    reads = read_by(model.target_embedding, decoder_residuals(model))
    for number, block in enumerate(model.decoder_stack):
        _even_sublayers(block, reads[3 * number])
        _move_norm(block.cross_attention_residual, block.cross_attention.query)
        _even_values(block.cross_attention, memory_of(model))
    return model


def _even_sublayers(layer: EncoderLayer | DecoderLayer, context: Activations) -> None:
    """Those that both kinds of layers have; the first one reads this context."""
    attention = layer.self_attention
    _move_norm(layer.self_attention_residual, attention.query, attention.key, attention.value)
    _even_values(attention, context)
    gate = layer.feed_forward.gate
    _move_norm(layer.feed_forward_residual, layer.feed_forward.inner, *([] if gate is None else [gate]))


def _move_norm(residual: Residual, *readers: nn.Linear) -> None:
    """Weight and bias of a norm go to the layers that read it, if nothing else does: in post-norm the sum does too."""
    if not residual.pre_norm:
        return
    norm = residual.norm
    for layer in readers:
        if isinstance(norm, nn.LayerNorm):
            layer.bias.add_(layer.weight @ norm.bias)
        layer.weight.mul_(norm.weight)
    norm.reset_parameters()


def _even_values(attention: MultiHeadAttention, context: Activations) -> None:
    """All features of the values, made of this context, with the same bound, and so of what attention makes of them."""
    bound = context.through(attention.value).bound(HEADS_DEVIATIONS)  # (G * K,)
    ratio = (bound / bound.max().clamp_min(SMALLEST_SCALE)).clamp_min(1 / LARGEST_RATIO)
    attention.value.weight.div_(ratio[:, None])
    attention.value.bias.div_(ratio)
    groups = ratio.view(attention.num_kv_heads, 1, -1).expand(-1, attention.num_heads // attention.num_kv_heads, -1)
    attention.output.weight.mul_(groups.flatten())
