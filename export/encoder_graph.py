"""The encoder as a graph: source ids to memory and to the keys and values that every decoder layer will attend to.

Letters in the shape comments: B rows, S source tokens, C source capacity, D = d_model, H heads, K = D / H, L decoder layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from export.layers import IntegerMatrix, TokenEmbedding, fused_linear
from export.ops import attention_over_lengths, masked_attention, pad_to
from export.profile import Profile
from model.transformer import EncoderLayer, Transformer


class EncoderLayerGraph(nn.Module):
    """One trained encoder layer over the tokens of all rows laid end to end."""

    def __init__(self, layer: EncoderLayer, profile: Profile) -> None:
        super().__init__()
        attention, integer = layer.self_attention, profile.integer_products
        self.num_heads = attention.num_heads
        self.attend = {"attention": attention_over_lengths, "multi_head": masked_attention}[profile.encoder_attention]
        self.packed = fused_linear([attention.query, attention.key, attention.value], integer)
        self.output = fused_linear([attention.output], integer)
        self.attention_residual = layer.self_attention_residual
        self.inner = fused_linear([layer.feed_forward.inner], integer)
        self.activation = layer.feed_forward.activation
        self.outer = fused_linear([layer.feed_forward.outer], integer)
        self.feed_forward_residual = layer.feed_forward_residual

    def forward(self, x: Tensor, source_ids: Tensor, lengths: Tensor) -> Tensor:
        """x (B * S, D), source_ids (B, S) for the shape, lengths (B,) -> (B * S, D)."""
        batch, size = source_ids.shape
        packed = self.packed(self.attention_residual.before(x)).reshape(batch, size, -1)  # (B, S, 3 * D)
        query, key, value = packed.chunk(3, dim=-1)  # three (B, S, D)
        heads = self.attend(query, key, value, lengths, self.num_heads)  # (B, S, D)
        x = self.attention_residual.after(x, self.output(heads.reshape(batch * size, -1)))
        inner = self.activation(self.inner(self.feed_forward_residual.before(x)))  # (B * S, F)
        return self.feed_forward_residual.after(x, self.outer(inner))


class EncoderGraph(nn.Module):
    """The encoder, and the projections of the memory to keys and values of the decoder's cross-attention."""

    def __init__(self, model: Transformer, profile: Profile) -> None:
        super().__init__()
        integer = profile.integer_products
        self.config = model.config
        matrix = IntegerMatrix(model.source_embedding.tokens.weight) if integer else None
        self.embedding = TokenEmbedding(model.source_embedding, matrix)
        self.layers = nn.ModuleList(EncoderLayerGraph(layer, profile) for layer in model.encoder)
        self.norm = model.encoder_norm
        attentions = [layer.cross_attention for layer in model.decoder]
        self.cross = fused_linear([part for a in attentions for part in (a.key, a.value)], integer)

    def forward(self, source_ids: Tensor, source_lengths: Tensor, source_capacity: Tensor) -> tuple[Tensor, ...]:
        """source_ids (B, S), source_lengths (B,), source_capacity () -> memory (B, S, D) float32, and for each decoder layer
        keys (B, H, C, K) and values (B, H, C, K)."""
        batch, size = source_ids.shape
        config = self.config
        x = self.embedding.whole(source_ids).reshape(batch * size, config.d_model)
        for layer in self.layers:
            x = layer(x, source_ids, source_lengths)
        memory = self.norm(x)  # (B * S, D)
        states = self.cross(memory).reshape(batch, size, 2 * config.decoder_layers, config.num_heads, config.d_head)
        states = pad_to(states.permute(2, 0, 3, 1, 4), 3, source_capacity)  # (2 * L, B, H, C, K)
        return memory.reshape(batch, size, config.d_model).float(), *states.unbind(0)
