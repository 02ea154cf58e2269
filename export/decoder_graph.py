"""One step of the decoder as a graph: the last token of every row and the state, to candidates and the next state.

Letters in the shape comments: B rows, D = d_model, H heads, K = D / H, C a capacity, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.layers import IntegerLinear, IntegerMatrix, TokenEmbedding, fused_linear
from export.ops import (
    cached_attention_over_lengths,
    cross_attention_rewriting,
    cross_attention_step,
    largest,
    self_attention_step,
    tensor_scatter,
)
from export.profile import Profile
from model.transformer import DecoderLayer, Transformer


class DecoderLayerGraph(nn.Module):
    """One trained decoder layer for one new position of each row."""

    def __init__(self, layer: DecoderLayer, profile: Profile) -> None:
        super().__init__()
        attention, cross, integer = layer.self_attention, layer.cross_attention, profile.integer_products
        self.profile = profile
        self.num_heads = attention.num_heads
        self.packed = fused_linear([attention.query, attention.key, attention.value], integer)
        self.output = fused_linear([attention.output], integer)
        self.attention_residual = layer.self_attention_residual
        self.cross_query = fused_linear([cross.query], integer)
        self.cross_output = fused_linear([cross.output], integer)
        self.cross_residual = layer.cross_attention_residual
        self.inner = fused_linear([layer.feed_forward.inner], integer)
        self.activation = layer.feed_forward.activation
        self.outer = fused_linear([layer.feed_forward.outer], integer)
        self.feed_forward_residual = layer.feed_forward_residual

    def attend_to_target(
        self, packed: Tensor, key: Tensor, value: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """packed (B, 3 * D), caches (B, H, C, K), positions (B,) -> output (B, D) and both caches with the new position."""
        if self.profile.self_attention == "group_query":
            bound = torch.scalar_tensor(key.shape[2], dtype=torch.int32)
            last = positions.to(torch.int32)
            output, key, value = self_attention_step(packed.unsqueeze(1), key, value, last, bound, self.num_heads)
            return output.squeeze(1), key, value
        query, new_key, new_value = packed.unflatten(-1, (3, self.num_heads, 1, -1)).unbind(1)  # three (B, H, 1, K)
        key, value = tensor_scatter(key, new_key, positions), tensor_scatter(value, new_value, positions)
        return cached_attention_over_lengths(query, key, value, positions + 1).flatten(1), key, value

    def attend_to_source(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """query (B, D), the source's keys and values (B, H, C, K), lengths (B,) -> output (B, D) and what was written back."""
        if self.profile.cross_attention == "attention":
            heads = query.unflatten(-1, (self.num_heads, 1, -1))  # (B, H, 1, K)
            return cached_attention_over_lengths(heads, key, value, lengths).flatten(1), None, None
        bound = torch.scalar_tensor(key.shape[2], dtype=torch.int32)
        last = (lengths - 1).to(torch.int32)
        if self.profile.cross_attention == "group_query":
            return (
                cross_attention_step(query.unsqueeze(1), key, value, last, bound, self.num_heads).squeeze(1),
                None,
                None,
            )
        output, next_key, next_value = cross_attention_rewriting(
            query.unsqueeze(1), key, value, last, bound, self.num_heads
        )
        return output.squeeze(1), next_key, next_value

    def forward(
        self, x: Tensor, positions: Tensor, lengths: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """x (B, D) and the layer's state -> (B, D) and the next state, None where nothing was written."""
        self_key, self_value, cross_key, cross_value = state
        packed = self.packed(self.attention_residual.before(x))  # (B, 3 * D)
        heads, next_key, next_value = self.attend_to_target(packed, self_key, self_value, positions)
        x = self.attention_residual.after(x, self.output(heads))
        query = self.cross_query(self.cross_residual.before(x))  # (B, D)
        heads, cross_key_back, cross_value_back = self.attend_to_source(query, cross_key, cross_value, lengths)
        x = self.cross_residual.after(x, self.cross_output(heads))
        inner = self.activation(self.inner(self.feed_forward_residual.before(x)))  # (B, F)
        x = self.feed_forward_residual.after(x, self.outer(inner))
        return x, [next_key, next_value, cross_key_back, cross_value_back]


class DecoderGraph(nn.Module):
    """One step: embedding, layers, output projection, and the k best next tokens with their log-probabilities."""

    def __init__(self, model: Transformer, profile: Profile) -> None:
        super().__init__()
        config, integer = model.config, profile.integer_products
        matrix = IntegerMatrix(model.target_embedding.tokens.weight) if integer else None
        self.embedding = TokenEmbedding(model.target_embedding, matrix)
        self.layers = nn.ModuleList(DecoderLayerGraph(layer, profile) for layer in model.decoder)
        self.norm = model.decoder_norm
        self.output_projection: nn.Module = model.output_projection
        if integer:
            shared = matrix if config.share_embeddings else IntegerMatrix(model.output_projection.weight)
            assert shared is not None
            self.output_projection = IntegerLinear(shared, None)
        never = torch.zeros(config.vocab_size)
        never[[config.pad_id, config.bos_id]] = -torch.inf
        self.register_buffer("never", never)
        self.never: Tensor

    def forward(
        self, last_ids: Tensor, positions: Tensor, source_lengths: Tensor, k: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """last_ids, positions, source_lengths (B,), k (), state four tensors a layer -> candidate_ids (B, k), their
        log-probabilities (B, k), logits (B, V), and the state tensors that were written, in the order of the state."""
        x = self.embedding.step(last_ids, positions)  # (B, D)
        written: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            own = state[4 * number : 4 * number + 4]
            x, following = layer(x, positions, source_lengths, own)
            written += [tensor for tensor in following if tensor is not None]
        logits = self.output_projection(self.norm(x)).float()  # (B, V)
        # The start token and padding are no candidates, but the distribution stays that of the model: they are in the sum.
        values, candidates = largest(logits + self.never, k)
        scores = values - logits.logsumexp(dim=-1, keepdim=True)
        return candidates, scores, logits, *written


def state_names(layer: int) -> tuple[str, str, str, str]:
    """The state tensors of one decoder layer, in the order in which DecoderGraph takes them."""
    return f"self_key_{layer}", f"self_value_{layer}", f"cross_key_{layer}", f"cross_value_{layer}"
