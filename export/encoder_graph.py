"""The encoder as a graph: source ids to memory and to the keys and values that every decoder layer will attend to.

Letters in the shape comments: B rows, S source tokens, P valid tokens of all rows, C source capacity, D = d_model,
H heads, K = D / H, L decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.integer_state import IntegerState, heads_bound, in_steps
from export.layers import Bounded, IntegerMatrix, TokenEmbedding, bounded, fused_linear, last_linear
from export.ops import arange, attention_over_lengths, elements_of, masked_attention, rows_of, signed, split_rows
from export.profile import Profile
from export.spread import Activations, encoder_residuals, memory_of, read_by
from export.sublayers import FeedForwardGraph, ResidualStream
from model.transformer import DecoderLayer, EncoderLayer, MultiHeadAttention, Transformer


@dataclass(frozen=True)
class Packing:
    """Where the valid tokens of padded sources stand: worked out once for all layers."""

    lengths: Tensor  # (B,) int64
    places: Tensor  # (P, 2) int64, row and position of each valid token, row by row
    tokens: Tensor  # (B, S) int64, the valid token at each place, and behind a source's end its last one
    slots: Tensor  # (B, C) int64, the same for each place of a capacity

    @classmethod
    def of(cls, size: int, lengths: Tensor, capacity: Tensor) -> Packing:
        """Of sources padded to a size."""
        ends = lengths[:, None]  # (B, 1)
        starts = lengths.cumsum(0)[:, None] - ends  # (B, 1)
        steps = torch.arange(size)
        places = (steps < ends).nonzero()
        tokens = starts + torch.minimum(steps, ends - 1)
        slots = starts + torch.minimum(arange(capacity), ends - 1)
        return cls(lengths, places, tokens, slots)


class EncoderAttentionGraph(nn.Module):
    """Self-attention over the source."""

    def __init__(self, trained: MultiHeadAttention, profile: Profile, reads: Activations) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.attend = {"attention": attention_over_lengths, "multi_head": masked_attention}[profile.whole_attention]
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, reads) if profile.integer_products else None

    def forward(self, x: Tensor | Bounded, packing: Packing) -> Tensor:
        """x (P, D) -> (P, D)."""
        parts = split_rows(self.packed(x), x.shape[1])  # (P * 3, D)
        query, key, value = (rows_of(parts, packing.tokens * 3 + part) for part in range(3))  # three (B, S, D)
        heads = self.attend(query, key, value, packing.lengths, self.num_heads)  # (B, S, D)
        heads = elements_of(heads, packing.places)  # (P, D)
        y: Tensor = self.output(bounded(heads, self.bound))
        return y


class EncoderGraph(nn.Module):
    """The encoder, and the projections of the memory to keys and values of the decoder's cross-attention.

    Everything but attention is computed for the valid tokens alone, side by side.
    """

    def __init__(self, model: Transformer, profile: Profile) -> None:
        super().__init__()
        integer = profile.integer_products
        self.config = model.config
        matrix = IntegerMatrix(model.source_embedding.tokens.weight) if integer else None
        self.embedding = TokenEmbedding(model.source_embedding, matrix)
        layers = [layer for layer in model.encoder if isinstance(layer, EncoderLayer)]
        residuals = encoder_residuals(model)
        reads = read_by(model.source_embedding, residuals)
        self.attentions = nn.ModuleList(
            EncoderAttentionGraph(layer.self_attention, profile, reads[2 * number])
            for number, layer in enumerate(layers)
        )
        self.feed_forwards = nn.ModuleList(
            FeedForwardGraph(layer.feed_forward, integer, reads[2 * number + 1]) for number, layer in enumerate(layers)
        )
        self.stream = ResidualStream(
            residuals,
            [part for layer in layers for part in (layer.self_attention.output, layer.feed_forward.outer)],
            model.encoder_norm,
            profile,
        )
        self.integer_state = profile.integer_state
        self.cross = fused_linear(self._keys_and_values(model), integer)

    def _keys_and_values(self, model: Transformer) -> list[nn.Linear]:
        found = []
        for attention in _cross_attentions(model):
            layers = [attention.key, attention.value]
            if self.integer_state:
                scales = IntegerState(attention, memory_of(model)).scales
                layers = [in_steps(layer, scale) for layer, scale in zip(layers, scales, strict=True)]
            found += layers
        return found

    def forward(self, source_ids: Tensor, source_lengths: Tensor, source_capacity: Tensor) -> tuple[Tensor, ...]:
        """source_ids (B, S), source_lengths (B,), source_capacity () -> memory (B, S, D) float32, and for each decoder
        layer keys (B, H, C, K) and values (B, H, C, K).
        """
        config = self.config
        packing = Packing.of(source_ids.shape[1], source_lengths, source_capacity)
        embedded = self.embedding.step(elements_of(source_ids, packing.places), packing.places[:, 1])  # (P, D)
        total, x = self.stream.start(embedded)
        for number, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            total, x = self.stream.add(2 * number, total, attention(x, packing))
            total, x = self.stream.add(2 * number + 1, total, feed_forward(x))  # both (P, D)
        cross = self.cross(x)
        cross = split_rows(signed(cross) if self.integer_state else cross, config.d_head)  # (P * 2 * L * H, K)
        states = 2 * config.decoder_layers
        heads = packing.slots[:, None, :] * (states * config.num_heads) + torch.arange(config.num_heads)[:, None]
        memory = x.values if isinstance(x, Bounded) else x
        keys_and_values = [rows_of(cross, heads + n * config.num_heads) for n in range(states)]
        return rows_of(memory, packing.tokens).float(), *keys_and_values


def _cross_attentions(model: Transformer) -> list[MultiHeadAttention]:
    return [layer.cross_attention for layer in model.decoder if isinstance(layer, DecoderLayer)]
