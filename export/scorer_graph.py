"""A whole target read at once: the log-probability of each of its tokens, and which source tokens each attended to.

Letters in the shape comments: B rows, T target tokens, C source capacity, D = d_model, H heads, G heads of keys and
values, K = D / H, V the vocabulary.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from export.decoder_graph import DecoderStack
from export.integer_state import IntegerState, heads_bound
from export.layers import Bounded, bounded, fused_linear, last_linear
from export.ops import (
    Heads,
    cached_attention_over_lengths,
    causal_attention,
    masked_attention,
    unidirectional_attention,
)
from export.profile import Profile
from export.spread import Activations
from model.attention import CrossAttention, SelfAttention, valid_tokens
from model.positions import rotate, rotate_heads
from model.transformer import StackPositions, Transformer


class CausalAttentionGraph(nn.Module):
    """Self-attention over the target, each position over those up to it that its kind of attention reaches."""

    def __init__(
        self, trained: SelfAttention, profile: Profile, context: Activations, positions: StackPositions
    ) -> None:
        super().__init__()
        self.heads = Heads.of(trained)
        self.trained, self.positions = trained, positions
        operator = {"attention": causal_attention, "multi_head": unidirectional_attention}[profile.whole_attention]
        self.attend = operator if trained.kind == "full" else None
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state: IntegerState | None = None
        if profile.integer_state and trained.kind == "full":
            self.state = IntegerState(trained, context, positions.cosines is not None)

    def forward(self, x: Tensor | Bounded, bias: Tensor | None) -> Tensor:
        """x (B, T, D), bias of the scores (1, H, T, T) -> (B, T, D)."""
        packed = self.packed(x)  # (B, T, (H + 2 * G) * K)
        queries, keys = self.heads.queries, self.heads.keys
        width = packed.shape[2] // (queries + 2 * keys)  # K
        query, key, value = torch.split(packed, [queries * width, keys * width, keys * width], dim=-1)
        positions = self.positions(x.shape[1], None)
        if positions.rotation is not None:
            query, key = (rotate_heads(part, width, *positions.rotation) for part in (query, key))
        if self.state is not None:  # as the steps read them
            key, value = self.state.rounded(key, value)
        if self.attend is not None:
            heads = self.attend(query, key, value, self.heads, bias)
        else:
            key, value = self.heads.repeat(key), self.heads.repeat(value)
            query, key, value = (self.trained.split_heads(part, queries) for part in (query, key, value))
            heads = _side_by_side(self.trained.attend(query, key, value, positions))
        y: Tensor = self.output(bounded(heads, self.bound))
        return y


class SourceAttentionGraph(nn.Module):
    """Attention of every target position over the source, in two halves: ask, then attend."""

    def __init__(
        self, trained: CrossAttention, profile: Profile, context: Activations, positions: StackPositions | None
    ) -> None:
        super().__init__()
        self.heads = Heads.of(trained)
        self.positions = positions
        self.on_heads = profile.whole_attention == "attention"
        self.query = fused_linear([trained.query], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state = IntegerState(trained, context, positions is not None) if profile.integer_state else None

    def ask(self, x: Tensor | Bounded) -> Tensor:
        """x (B, T, D) -> the queries (B, H, T, K), rotated if they are."""
        queries: Tensor = self.query(x).unflatten(2, (self.heads.queries, -1)).transpose(1, 2)
        if self.positions is not None and self.positions.rotation is not None:
            queries = rotate(queries, *(table[: x.shape[1]] for table in self.positions.rotation))
        return queries

    def read(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The source's keys and values (B, G, C, K) as they are to be computed with."""
        return (key, value) if self.state is None else self.state.expand(key, value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """query (B, H, T, K), the source's keys and values (B, G, C, K), lengths (B,) -> (B, T, D)."""
        if self.on_heads:
            attended = _side_by_side(cached_attention_over_lengths(query, key, value, lengths))
        else:
            query, key, value = map(_side_by_side, (query, key, value))
            attended = masked_attention(query, key, value, lengths, self.heads)
        y: Tensor = self.output(bounded(attended, self.bound))
        return y


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, L, K) -> (B, L, D)."""
    return heads.transpose(1, 2).flatten(2)


def source_weights(query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
    """query (B, H, T, K), key (B, G, C, K), lengths (B,) -> float32 (B, T, C): how much each target position attends to
    each source position, mean of the heads; each row sums to 1, with nothing behind the source's length.
    """
    if query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).float()  # (B, H, T, C)
    valid = valid_tokens(lengths, key.shape[2])[:, None, None, :]  # (B, 1, 1, C)
    heads = scores.masked_fill(~valid, -torch.inf).softmax(dim=-1).unbind(1)
    # One by one: ReduceMean adds the heads of a row alone in another order than those of several rows.
    total: Tensor = reduce(torch.add, heads)
    return total / len(heads)


class ScorerGraph(DecoderStack):
    """Teacher forcing: the decoder reads the start token and the target, all positions in one pass."""

    def __init__(self, model: Transformer, profile: Profile, alignment_layer: int) -> None:
        super().__init__(model, profile, CausalAttentionGraph, SourceAttentionGraph)
        self.bos_id = model.config.bos_id
        self.bias = model.target_positions.bias
        self.alignment_layer = alignment_layer

    def forward(self, target_ids: Tensor, source_lengths: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        """target_ids (B, T) with their end token, source_lengths (B,), state the source's keys and values of each layer
        -> log_probabilities (B, T) of these tokens over the whole vocabulary, alignment (B, T, C).
        """
        start = target_ids.new_full((target_ids.shape[0], 1), self.bos_id)
        read = torch.cat([start, target_ids[:, :-1]], dim=1)  # (B, T)
        total, x = self.stream.start(self.embedding.whole(read))  # both (B, T, D)
        alignment, bias = total, None
        if self.bias is not None:
            places = torch.arange(read.shape[1])
            bias = self.bias(places, places).unsqueeze(0)  # (1, H, T, T)
        layers = zip(self.self_attentions, self.cross_attentions, self.feed_forwards, strict=True)
        for number, (self_attention, cross_attention, feed_forward) in enumerate(layers):
            assert isinstance(cross_attention, SourceAttentionGraph)
            key, value = cross_attention.read(*state[2 * number : 2 * number + 2])
            total, x = self.stream.add(3 * number, total, self_attention(x, bias))
            query = cross_attention.ask(x)
            if number == self.alignment_layer:
                alignment = source_weights(query, key, source_lengths)
            total, x = self.stream.add(3 * number + 1, total, cross_attention(query, key, value, source_lengths))
            output = feed_forward(x)
            if number + 1 == len(self.feed_forwards):
                total, output = total.flatten(0, 1), output.flatten(0, 1)  # (B * T, D)
            total, x = self.stream.add(3 * number + 2, total, output)
        logits = self.output_projection(x).float()  # (B * T, V)
        of_targets = logits.log_softmax(dim=-1).gather(1, target_ids.reshape(-1, 1))  # (B * T, 1)
        return of_targets.reshape(target_ids.shape), alignment
