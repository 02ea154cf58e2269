"""One step of the decoder as a graph: the last token of every row and the state, to candidates and the next state.

Letters in the shape comments: B rows, D = d_model, H heads, G heads of keys and values, K = D / H, C a capacity, V the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

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
    Heads,
    cached_attention_over_lengths,
    cross_attention_of_integers,
    cross_attention_rewriting,
    cross_attention_step,
    rows_of,
    side_by_side,
    slices_of,
    top,
)
from export.profile import Profile
from export.self_attention import STEP_ATTENTIONS, Places
from export.spread import Activations, decoder_residuals, memory_of, read_by
from export.state import target_state
from export.sublayers import FeedForwardGraph, ResidualStream
from model.attention import CrossAttention, SelfAttention
from model.positions import RelativeBias, rotate_heads
from model.transformer import StackPositions, Transformer

AttendsToTarget = Callable[[SelfAttention, Profile, Activations, StackPositions], nn.Module]
"""Makes the module of a self-attention out of the trained one, of what it reads, and of its stack's positions."""

AttendsToSource = Callable[[CrossAttention, Profile, Activations, StackPositions | None], nn.Module]
"""The same of a cross-attention, whose keys and values are made of the memory; positions if they rotate its queries."""


class CrossAttentionGraph(nn.Module):
    """Attention of one new position over the source."""

    def __init__(
        self, trained: CrossAttention, profile: Profile, context: Activations, positions: StackPositions | None
    ) -> None:
        super().__init__()
        self.heads = Heads.of(trained)
        self.positions = positions
        self.kind = profile.cross_attention
        self.query = fused_linear([trained.query], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.state = IntegerState(trained, context, positions is not None) if profile.integer_state else None

    def forward(self, x: Tensor | Bounded, places: Places, key: Tensor, value: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, 1, D), the source's keys and values (B, G, C, K) -> (B, 1, D), and what had to be written back."""
        query = self.query(x)  # (B, 1, D)
        if self.positions is not None and self.positions.rotation is not None:
            angles = [rows_of(table, places.positions)[:, None] for table in self.positions.rotation]  # (B, 1, K / 2)
            query = rotate_heads(query, x.shape[2] // self.heads.queries, *angles)
        if self.kind == "attention":
            shape = (x.shape[0], self.heads.queries, 1, x.shape[2] // self.heads.queries)
            attended = cached_attention_over_lengths(query.reshape(shape), key, value, places.lengths)
            return self.output(bounded(attended.reshape(x.shape), self.bound)), []
        arguments = (query, key, value, places.last_source, places.source_capacity, self.heads)
        written: list[Tensor] = []
        if self.state is not None:
            attended, *written = cross_attention_of_integers(*arguments, self.state.scales)
        elif self.kind == "group_query":
            attended = cross_attention_step(*arguments)
        else:
            attended, *written = cross_attention_rewriting(*arguments)
        return self.output(bounded(attended, self.bound)), written


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

    def __init__(
        self,
        model: Transformer,
        profile: Profile,
        self_attention: AttendsToTarget,
        cross_attention: AttendsToSource,
    ) -> None:
        super().__init__()
        config, integer = model.config, profile.integer_products
        matrix = IntegerMatrix(model.target_embedding.tokens.weight) if integer else None
        self.embedding = TokenEmbedding(model.target_embedding, matrix)
        layers = model.decoder_stack
        residuals = decoder_residuals(model)
        reads, memory = read_by(model.target_embedding, residuals), memory_of(model)
        self.self_attentions = nn.ModuleList(
            self_attention(layer.self_attention, profile, reads[3 * number], model.target_positions)
            for number, layer in enumerate(layers)
        )
        positions = model.target_positions if config.rotary_cross_attention else None
        self.cross_attentions = nn.ModuleList(
            cross_attention(layer.cross_attention, profile, memory, positions) for layer in layers
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
        config = model.config
        super().__init__(model, profile, STEP_ATTENTIONS[config.decoder_attention], CrossAttentionGraph)
        self.bias = model.target_positions.bias
        self.ring = config.decoder_attention == "window"
        self.own_tensors = len(target_state(config, 0))
        self.never = [model.config.pad_id, model.config.bos_id]

    def forward(
        self, last_ids: Tensor, positions: Tensor, source_lengths: Tensor, k: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """last_ids, positions, source_lengths (B,), k (), state of each layer -> candidate_ids (B, k), their
        log-probabilities (B, k), logits (B, V), and the state tensors that were written, in the order of the state.
        """
        own = self.own_tensors
        bias = None if self.bias is None else self._bias_of(self.bias, positions, state[0].shape[2])
        places = Places.of(positions, source_lengths, state[0], state[own], bias)
        total, x = self.stream.start(self.embedding.step(last_ids, positions).unsqueeze(1))  # both (B, 1, D)
        written: list[Tensor] = []
        layers = zip(self.self_attentions, self.cross_attentions, self.feed_forwards, strict=True)
        for number, (self_attention, cross_attention, feed_forward) in enumerate(layers):
            of_layer = state[(own + 2) * number : (own + 2) * (number + 1)]
            output, updated = self_attention(x, places, *of_layer[:own])
            total, x = self.stream.add(3 * number, total, output)
            output, rewritten = cross_attention(x, places, *of_layer[own:])
            total, x = self.stream.add(3 * number + 1, total, output)
            output = feed_forward(x)
            if number + 1 == len(self.feed_forwards):
                total, output = total.squeeze(1), output.squeeze(1)  # (B, D)
            total, x = self.stream.add(3 * number + 2, total, output)
            written += [*updated, *rewritten]
        logits = self.output_projection(x).float()  # (B, V)
        # Padding and the start token are no candidates, but the distribution stays the model's: they are in its sum.
        never = torch.tensor([self.never]).expand(logits.shape[0], 2)
        scores, candidates = best_tokens(logits.log_softmax(dim=-1).scatter(1, never, -torch.inf), k)
        return candidates, scores, logits, *written

    def _bias_of(self, bias: RelativeBias, positions: Tensor, capacity: int) -> Tensor:
        """Of the scores of the places of a cache (B, H, 1, C) at positions (B,)."""
        places = torch.arange(capacity)
        keys = positions[:, None] - (positions[:, None] - places) % capacity if self.ring else places[None]
        y: Tensor = bias(positions[:, None], keys)
        return y
