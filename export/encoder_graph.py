"""The encoder as a graph: source ids to memory and to the keys and values that every decoder layer will attend to.

Letters in the shape comments: B rows, S source tokens, C source capacity, D = d_model, H heads, K = D / H, L decoder
layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from export.layers import IntegerMatrix, TokenEmbedding, fused_linear
from export.ops import attention_over_lengths, masked_attention, pad_to
from export.profile import Profile
from export.sublayers import FeedForwardGraph, ResidualStream
from model.transformer import DecoderLayer, EncoderLayer, MultiHeadAttention, Transformer


class EncoderAttentionGraph(nn.Module):
    """Self-attention over the source, without its last bias."""

    def __init__(self, trained: MultiHeadAttention, profile: Profile) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.attend = {"attention": attention_over_lengths, "multi_head": masked_attention}[profile.whole_attention]
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = fused_linear([trained.output], profile.integer_products, bias=False)

    def forward(self, x: Tensor, source_ids: Tensor, lengths: Tensor) -> Tensor:
        """x (B * S, D), source_ids (B, S) for the shape, lengths (B,) -> (B * S, D)."""
        batch, size = source_ids.shape
        query, key, value = self.packed(x).reshape(batch, size, -1).chunk(3, dim=-1)  # three (B, S, D)
        heads = self.attend(query, key, value, lengths, self.num_heads)  # (B, S, D)
        y: Tensor = self.output(heads.reshape(batch * size, -1))
        return y


class EncoderGraph(nn.Module):
    """The encoder, and the projections of the memory to keys and values of the decoder's cross-attention."""

    def __init__(self, model: Transformer, profile: Profile) -> None:
        super().__init__()
        integer = profile.integer_products
        self.config = model.config
        matrix = IntegerMatrix(model.source_embedding.tokens.weight) if integer else None
        self.embedding = TokenEmbedding(model.source_embedding, matrix)
        layers = [layer for layer in model.encoder if isinstance(layer, EncoderLayer)]
        self.attentions = nn.ModuleList(EncoderAttentionGraph(layer.self_attention, profile) for layer in layers)
        self.feed_forwards = nn.ModuleList(FeedForwardGraph(layer.feed_forward, integer) for layer in layers)
        self.stream = ResidualStream(
            [part for layer in layers for part in (layer.self_attention_residual, layer.feed_forward_residual)],
            [part for layer in layers for part in (layer.self_attention.output, layer.feed_forward.outer)],
            model.encoder_norm,
            profile,
        )
        self.cross = fused_linear([part for a in _cross_attentions(model) for part in (a.key, a.value)], integer)

    def forward(self, source_ids: Tensor, source_lengths: Tensor, source_capacity: Tensor) -> tuple[Tensor, ...]:
        """source_ids (B, S), source_lengths (B,), source_capacity () -> memory (B, S, D) float32, and for each decoder
        layer keys (B, H, C, K) and values (B, H, C, K).
        """
        batch, size = source_ids.shape
        config = self.config
        total, x = self.stream.start(self.embedding.whole(source_ids).reshape(batch * size, config.d_model))
        for number, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            total, x = self.stream.add(2 * number, total, attention(x, source_ids, source_lengths))
            total, x = self.stream.add(2 * number + 1, total, feed_forward(x))  # both (B * S, D)
        shape = (batch, size, 2 * config.decoder_layers, config.num_heads, config.d_head)
        states = self.cross(x).reshape(shape).permute(2, 0, 3, 1, 4)  # (2 * L, B, H, S, K)
        states = pad_to(states, 3, source_capacity)  # (2 * L, B, H, C, K)
        return x.reshape(batch, size, config.d_model).float(), *states.unbind(0)


def _cross_attentions(model: Transformer) -> list[MultiHeadAttention]:
    return [layer.cross_attention for layer in model.decoder if isinstance(layer, DecoderLayer)]
