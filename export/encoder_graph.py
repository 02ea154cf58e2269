"""The encoder as a graph: source ids to memory and to the keys and values that every decoder layer will attend to.

Letters in the shape comments: B rows, S source tokens, P valid tokens of all rows, C source capacity, D = d_model,
H heads, G heads of keys and values, K = D / H, L different decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.integer_state import IntegerState, heads_bound, in_steps
from export.layers import Bounded, FloatLinear, IntegerMatrix, TokenEmbedding, bounded, fused_linear, last_linear
from export.ops import (
    Heads,
    arange,
    attention_over_lengths,
    elements_of,
    masked_attention,
    rows_of,
    signed,
    split_rows,
)
from export.profile import Profile
from export.spread import Activations, encoder_residuals, memory_of, read_by
from export.sublayers import FeedForwardGraph, ResidualStream
from model.attention import Positions, SelfAttention
from model.positions import rotate_heads
from model.transformer import StackPositions, Transformer


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

    def __init__(self, trained: SelfAttention, profile: Profile, reads: Activations, positions: StackPositions) -> None:
        super().__init__()
        self.heads = Heads.of(trained)
        self.trained, self.positions = trained, positions
        operator = {"attention": attention_over_lengths, "multi_head": masked_attention}[profile.whole_attention]
        self.attend = operator if trained.kind == "full" else None
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, reads) if profile.integer_products else None

    def forward(self, x: Tensor | Bounded, packing: Packing, bias: Tensor | None) -> Tensor:
        """x (P, D), bias of the scores (1, H, S, S) -> (P, D)."""
        query, key, value = self.unpacked(self.packed(x), packing)
        if self.attend is not None:
            heads = self.attend(query, key, value, packing.lengths, self.heads, bias)  # (B, S, D)
        else:
            key, value = self.heads.repeat(key), self.heads.repeat(value)
            query, key, value = (self.trained.split_heads(part, self.heads.queries) for part in (query, key, value))
            positions = Positions(packing.lengths, self.positions.bias)
            heads = self.trained.attend(query, key, value, positions).transpose(1, 2).flatten(2)
        heads = elements_of(heads, packing.places)  # (P, D)
        y: Tensor = self.output(bounded(heads, self.bound))
        return y

    def unpacked(self, packed: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        """packed (P, (H + 2 * G) * K) -> query (B, S, D), key and value (B, S, G * K), padded."""
        queries, keys = self.heads.queries, self.heads.keys
        width = packed.shape[1] // (queries + 2 * keys)  # K
        if queries == keys and self.positions.rotation is None:  # one copy less
            parts = split_rows(packed, queries * width)  # (P * 3, D)
            query, key, value = (rows_of(parts, packing.tokens * 3 + part) for part in range(3))
            return query, key, value
        query, key, value = torch.split(packed, [queries * width, keys * width, keys * width], dim=-1)
        if self.positions.rotation is not None:
            angles = [rows_of(table, packing.places[:, 1]) for table in self.positions.rotation]  # two (P, K / 2)
            query, key = (rotate_heads(part, width, *angles) for part in (query, key))
        query, key, value = (rows_of(part, packing.tokens) for part in (query, key, value))
        return query, key, value


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
        layers = model.encoder_stack
        self.bias = model.source_positions.bias if model.config.encoder_attention == "full" else None
        residuals = encoder_residuals(model)
        reads = read_by(model.source_embedding, residuals)
        self.attentions = nn.ModuleList(
            EncoderAttentionGraph(layer.self_attention, profile, reads[2 * number], model.source_positions)
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
        self.positions = model.source_positions if model.config.rotary_cross_attention else None
        linears = self._keys_and_values(model)
        self.cross = fused_linear(linears, integer) if linears else None
        classifier = model.classifier
        self.classifier = None if classifier is None else FloatLinear(classifier.weight, classifier.bias)

    def _keys_and_values(self, model: Transformer) -> list[nn.Linear]:
        found = []
        # Of the different layers alone: those that share their weights read the same keys and values.
        for attention in (layer.cross_attention for layer in model.different_decoder_layers):
            layers = [attention.key, attention.value]
            if self.integer_state:
                scales = IntegerState(attention, memory_of(model), self.positions is not None).scales
                layers = [in_steps(layer, scale) for layer, scale in zip(layers, scales, strict=True)]
            found += layers
        return found

    def forward(self, source_ids: Tensor, source_lengths: Tensor, source_capacity: Tensor) -> tuple[Tensor, ...]:
        """source_ids (B, S), source_lengths (B,), source_capacity () -> memory (B, S, D) float32, of a classifier the
        logits (B, S, labels) float32 of each token, whose mean is the text's, and for each decoder layer keys
        (B, G, C, K) and values (B, G, C, K).
        """
        packing = Packing.of(source_ids.shape[1], source_lengths, source_capacity)
        embedded = self.embedding.step(elements_of(source_ids, packing.places), packing.places[:, 1])  # (P, D)
        total, x = self.stream.start(embedded)
        bias = None
        if self.bias is not None:
            places = torch.arange(source_ids.shape[1])
            bias = self.bias(places, places).unsqueeze(0)  # (1, H, S, S)
        for number, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            total, x = self.stream.add(2 * number, total, attention(x, packing, bias))
            total, x = self.stream.add(2 * number + 1, total, feed_forward(x))  # both (P, D)
        memory = x.values if isinstance(x, Bounded) else x
        outputs = [rows_of(memory, packing.tokens).float()]
        if self.classifier is not None:
            outputs.append(rows_of(self.classifier(memory), packing.tokens).float())
        if self.cross is not None:
            outputs += self._for_decoder(self.cross(x), packing)
        return tuple(outputs)

    def _for_decoder(self, cross: Tensor, packing: Packing) -> list[Tensor]:
        """Keys and values of the different layers side by side (P, 2 * L * G * K) -> those of each place, padded."""
        config = self.config
        if self.positions is not None and self.positions.rotation is not None:
            cross = self._rotated(cross, [rows_of(table, packing.places[:, 1]) for table in self.positions.rotation])
        cross = split_rows(signed(cross) if self.integer_state else cross, config.d_head)  # (P * 2 * L * G, K)
        states, groups = 2 * len(set(config.decoder_order)), config.kv_heads
        heads = packing.slots[:, None, :] * (states * groups) + torch.arange(groups)[:, None]
        return [
            rows_of(cross, heads + (2 * layer + part) * groups) for layer in config.decoder_order for part in range(2)
        ]

    def _rotated(self, cross: Tensor, angles: list[Tensor]) -> Tensor:
        """Keys and values as in _for_decoder, of tokens with these angles (P, K / 2): the keys are rotated. They are in
        steps of integers too, before they are rounded: both sides of a plane share a scale.
        """
        config = self.config
        parts = cross.reshape(cross.shape[0], -1, 2, config.kv_heads * config.d_head)
        keys, values = parts.unbind(2)  # both (P, L, G * K)
        keys = rotate_heads(keys, config.d_head, *(table[:, None] for table in angles))
        return torch.stack([keys, values], dim=2).flatten(1)
