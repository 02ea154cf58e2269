"""A whole target read at once: the log-probability of each of its tokens, and which source tokens each attended to.

Letters in the shape comments: B rows, T target tokens, C source capacity, D = d_model, H heads, K = D / H, V the
vocabulary.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from export.decoder_graph import DecoderStack
from export.integer_state import IntegerState, heads_bound
from export.layers import Bounded, bounded, fused_linear, last_linear
from export.ops import (
    cached_attention_over_lengths,
    causal_attention,
    masked_attention,
    unidirectional_attention,
)
from export.profile import Profile
from export.spread import Activations
from model.transformer import MultiHeadAttention, Transformer, valid_tokens


class CausalAttentionGraph(nn.Module):
    """Self-attention over the target, each position over those up to it."""

    def __init__(self, trained: MultiHeadAttention, profile: Profile, context: Activations) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.attend = {"attention": causal_attention, "multi_head": unidirectional_attention}[profile.whole_attention]
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state = IntegerState(trained, context) if profile.integer_state else None

    def forward(self, x: Tensor | Bounded) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        query, key, value = self.packed(x).chunk(3, dim=-1)  # three (B, T, D)
        if self.state is not None:  # as the steps read them
            key, value = self.state.rounded(key, value)
        heads = self.attend(query, key, value, self.num_heads)
        y: Tensor = self.output(bounded(heads, self.bound))
        return y


class SourceAttentionGraph(nn.Module):
    """Attention of every target position over the source, in two halves: ask, then attend."""

    def __init__(self, trained: MultiHeadAttention, profile: Profile, context: Activations) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.on_heads = profile.whole_attention == "attention"
        self.query = fused_linear([trained.query], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state = IntegerState(trained, context) if profile.integer_state else None

    def ask(self, x: Tensor | Bounded) -> Tensor:
        """x (B, T, D) -> the queries (B, H, T, K)."""
        queries: Tensor = self.query(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return queries

    def read(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The source's keys and values (B, H, C, K) as they are to be computed with."""
        return (key, value) if self.state is None else self.state.expand(key, value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """query (B, H, T, K), the source's keys and values (B, H, C, K), lengths (B,) -> (B, T, D)."""
        if self.on_heads:
            heads = _side_by_side(cached_attention_over_lengths(query, key, value, lengths))
        else:
            query, key, value = map(_side_by_side, (query, key, value))
            heads = masked_attention(query, key, value, lengths, self.num_heads)
        y: Tensor = self.output(bounded(heads, self.bound))
        return y


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, L, K) -> (B, L, D)."""
    return heads.transpose(1, 2).flatten(2)


def source_weights(query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
    """query (B, H, T, K), key (B, H, C, K), lengths (B,) -> float32 (B, T, C): how much each target position attends to
    each source position, mean of the heads; each row sums to 1, with nothing behind the source's length.
    """
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
        self.alignment_layer = alignment_layer

    def forward(self, target_ids: Tensor, source_lengths: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        """target_ids (B, T) with their end token, source_lengths (B,), state the source's keys and values of each layer
        -> log_probabilities (B, T) of these tokens over the whole vocabulary, alignment (B, T, C).
        """
        start = target_ids.new_full((target_ids.shape[0], 1), self.bos_id)
        read = torch.cat([start, target_ids[:, :-1]], dim=1)  # (B, T)
        total, x = self.stream.start(self.embedding.whole(read))  # both (B, T, D)
        alignment = total
        layers = zip(self.self_attentions, self.cross_attentions, self.feed_forwards, strict=True)
        for number, (self_attention, cross_attention, feed_forward) in enumerate(layers):
            assert isinstance(cross_attention, SourceAttentionGraph)
            key, value = cross_attention.read(*state[2 * number : 2 * number + 2])
            total, x = self.stream.add(3 * number, total, self_attention(x))
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
