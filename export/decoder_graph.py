"""One step of the decoder as a graph: the last token of every row and the state, to candidates and the next state.

Letters in the shape comments: B rows, D = d_model, H heads, K = D / H, C a capacity, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.integer_state import IntegerState, heads_bound
from export.layers import (
    Bounded,
    FloatLinear,
    IntegerLinear,
    IntegerMatrix,
    TokenEmbedding,
    bounded,
    fused_linear,
    last_linear,
)
from export.ops import (
    cached_attention_over_lengths,
    cross_attention_of_integers,
    cross_attention_rewriting,
    cross_attention_step,
    self_attention_step,
    side_by_side,
    slices_of,
    tensor_scatter,
    top,
)
from export.profile import Profile
from export.spread import Activations, decoder_residuals, memory_of, read_by
from export.sublayers import FeedForwardGraph, ResidualStream
from model.transformer import DecoderLayer, MultiHeadAttention, Transformer

Attends = Callable[[MultiHeadAttention, Profile, Activations], nn.Module]
"""Makes the module of an attention out of the trained one, and of what its keys and values are made of."""


def state_names(layer: int) -> tuple[str, str, str, str]:
    """The state tensors of one decoder layer, in the order in which DecoderGraph takes them."""
    return f"self_key_{layer}", f"self_value_{layer}", f"cross_key_{layer}", f"cross_value_{layer}"


@dataclass(frozen=True)
class Places:
    """Where each row is, in the forms that the attention operators want; worked out once for all layers."""

    positions: Tensor  # (B,) int64, of the new position
    lengths: Tensor  # (B,) int64, of the source
    last_target: Tensor  # (B,) int32, the new position
    last_source: Tensor  # (B,) int32, the source's last position
    target_capacity: Tensor  # () int32
    source_capacity: Tensor  # () int32; capacities bound the lengths, and are known without looking at any value

    @classmethod
    def of(cls, positions: Tensor, lengths: Tensor, self_key: Tensor, cross_key: Tensor) -> Places:
        """positions and lengths (B,), and any cache of each kind (B, H, C, K)."""
        capacities = (torch.scalar_tensor(cache.shape[2], dtype=torch.int32) for cache in (self_key, cross_key))
        return cls(positions, lengths, positions.to(torch.int32), (lengths - 1).to(torch.int32), *capacities)


class SelfAttentionGraph(nn.Module):
    """Attention of one new position over the target so far."""

    def __init__(self, trained: MultiHeadAttention, profile: Profile, context: Activations) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.grouped = profile.self_attention == "group_query"
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state = IntegerState(trained, context) if profile.integer_state else None

    def forward(self, x: Tensor | Bounded, places: Places, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 1, D), caches (B, H, C, K) -> (B, 1, D), and both caches with the new position."""
        packed = self.packed(x)  # (B, 1, 3 * D)
        if self.grouped:
            last, bound = places.last_target, places.target_capacity
            scales = None if self.state is None else self.state.scales
            heads, key, value = self_attention_step(packed, key, value, last, bound, self.num_heads, scales)
            return self.output(bounded(heads, self.bound)), key, value
        shape = (packed.shape[0], 3, self.num_heads, 1, packed.shape[2] // (3 * self.num_heads))
        query, new_key, new_value = packed.reshape(shape).unbind(1)  # three (B, H, 1, K)
        key = tensor_scatter(key, new_key, places.positions)
        value = tensor_scatter(value, new_value, places.positions)
        heads = cached_attention_over_lengths(query, key, value, places.positions + 1)  # (B, H, 1, K)
        return self.output(bounded(heads.reshape(x.shape), self.bound)), key, value


class CrossAttentionGraph(nn.Module):
    """Attention of one new position over the source."""

    def __init__(self, trained: MultiHeadAttention, profile: Profile, context: Activations) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.kind = profile.cross_attention
        self.query = fused_linear([trained.query], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state = IntegerState(trained, context) if profile.integer_state else None

    def forward(self, x: Tensor | Bounded, places: Places, key: Tensor, value: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, 1, D), the source's keys and values (B, H, C, K) -> (B, 1, D), and what had to be written back."""
        query = self.query(x)  # (B, 1, D)
        if self.kind == "attention":
            shape = (x.shape[0], self.num_heads, 1, x.shape[2] // self.num_heads)
            heads = cached_attention_over_lengths(query.reshape(shape), key, value, places.lengths)
            return self.output(bounded(heads.reshape(x.shape), self.bound)), []
        arguments = (query, key, value, places.last_source, places.source_capacity, self.num_heads)
        written: list[Tensor] = []
        if self.state is not None:
            heads, *written = cross_attention_of_integers(*arguments, self.state.scales)
        elif self.kind == "group_query":
            heads = cross_attention_step(*arguments)
        else:
            heads, *written = cross_attention_rewriting(*arguments)
        return self.output(bounded(heads, self.bound)), written


def best_tokens(scores: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The k () largest of each row of scores (B, V), best first: values and indices, both (B, k).

    TopK looks at one number at a time, ReduceMax at a register full: so the tokens stand in groups, and only the k best
    groups are looked at, which hold the k best tokens. Of equal tokens, which is first is a matter of their row alone,
    and the k best are the first of more.
    """
    size = group_size(scores.shape[1])
    groups = scores.reshape(scores.shape[0], -1, size)  # (B, V / size, size)
    _, chosen = top(groups.amax(dim=2), k.clamp_max(groups.shape[1]))  # (B, k)
    ids = (chosen * size).unsqueeze(2) + torch.arange(size)  # (B, k, size)
    values, places = top(side_by_side(slices_of(groups, chosen)), k)  # both (B, k)
    return values, side_by_side(ids).gather(1, places)


def group_size(tokens: int) -> int:
    """The divisor of a number of tokens that is nearest to its square root: as many groups as tokens in each."""
    return min((n for n in range(1, tokens + 1) if tokens % n == 0), key=lambda n: abs(n - tokens**0.5))


class DecoderStack(nn.Module):
    """The decoder's weights, in the forms that its graphs compute with.

    Whether they read one position or a whole target is the matter of the attentions that they bring.
    """

    def __init__(self, model: Transformer, profile: Profile, self_attention: Attends, cross_attention: Attends) -> None:
        super().__init__()
        config, integer = model.config, profile.integer_products
        matrix = IntegerMatrix(model.target_embedding.tokens.weight) if integer else None
        self.embedding = TokenEmbedding(model.target_embedding, matrix)
        layers = [layer for layer in model.decoder if isinstance(layer, DecoderLayer)]
        residuals = decoder_residuals(model)
        reads, memory = read_by(model.target_embedding, residuals), memory_of(model)
        self.self_attentions = nn.ModuleList(
            self_attention(layer.self_attention, profile, reads[3 * number]) for number, layer in enumerate(layers)
        )
        self.cross_attentions = nn.ModuleList(
            cross_attention(layer.cross_attention, profile, memory) for layer in layers
        )
        self.feed_forwards = nn.ModuleList(
            FeedForwardGraph(layer.feed_forward, integer, reads[3 * number + 2]) for number, layer in enumerate(layers)
        )
        linears = [
            (layer.self_attention.output, layer.cross_attention.output, layer.feed_forward.outer) for layer in layers
        ]
        self.stream = ResidualStream(
            residuals,
            [part for parts in linears for part in parts],
            model.decoder_norm,
            profile,
        )
        projection = model.output_projection.weight
        self.output_projection: nn.Module = FloatLinear(projection, None)
        if integer:
            shared = matrix if matrix is not None and config.share_embeddings else IntegerMatrix(projection)
            self.output_projection = IntegerLinear(shared, None)


class DecoderGraph(DecoderStack):
    """One step: embedding, layers, output projection, and the k best next tokens with their log-probabilities."""

    def __init__(self, model: Transformer, profile: Profile) -> None:
        super().__init__(model, profile, SelfAttentionGraph, CrossAttentionGraph)
        self.never = [model.config.pad_id, model.config.bos_id]

    def forward(
        self, last_ids: Tensor, positions: Tensor, source_lengths: Tensor, k: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """last_ids, positions, source_lengths (B,), k (), state four tensors a layer -> candidate_ids (B, k), their
        log-probabilities (B, k), logits (B, V), and the state tensors that were written, in the order of the state.
        """
        places = Places.of(positions, source_lengths, state[0], state[2])
        total, x = self.stream.start(self.embedding.step(last_ids, positions).unsqueeze(1))  # both (B, 1, D)
        written: list[Tensor] = []
        layers = zip(self.self_attentions, self.cross_attentions, self.feed_forwards, strict=True)
        for number, (self_attention, cross_attention, feed_forward) in enumerate(layers):
            self_key, self_value, cross_key, cross_value = state[4 * number : 4 * number + 4]
            output, next_key, next_value = self_attention(x, places, self_key, self_value)
            total, x = self.stream.add(3 * number, total, output)
            output, rewritten = cross_attention(x, places, cross_key, cross_value)
            total, x = self.stream.add(3 * number + 1, total, output)
            output = feed_forward(x)
            if number + 1 == len(self.feed_forwards):
                total, output = total.squeeze(1), output.squeeze(1)  # (B, D)
            total, x = self.stream.add(3 * number + 2, total, output)
            written += [next_key, next_value, *rewritten]
        logits = self.output_projection(x).float()  # (B, V)
        # Padding and the start token are no candidates, but the distribution stays the model's: they are in its sum.
        never = torch.tensor([self.never]).expand(logits.shape[0], 2)
        scores, candidates = best_tokens(logits.log_softmax(dim=-1).scatter(1, never, -torch.inf), k)
        return candidates, scores, logits, *written
