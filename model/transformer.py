"""The encoder-decoder transformer of Vaswani et al. (2017), "Attention Is All You Need".

Letters in the shape comments: B rows of a batch, S source tokens, T target tokens, L positions of either, D = d_model,
K the width of a head, F the feed-forward width, V the vocabulary.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention import CrossAttention, MultiHeadAttention, Positions, SelfAttention, valid_tokens
from model.config import Activation, TransformerConfig
from model.positions import RelativeBias, Rotation, rotary_tables, sinusoidal_positions


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014), drawn from random bytes on a CPU.

    There torch draws one Bernoulli number per element on one thread, a quarter of a training step of the default
    model; one byte per element is enough to decide, at a probability rounded to 1/256.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged outside of training."""
        if not self.training or self.probability == 0.0:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.probability)
        dropped = round(self.probability * 256)  # of the 256 values of a byte
        draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * keep * (256 / (256 - dropped))


class FeedForward(nn.Module):
    """Position-wise feed-forward network, section 3.3, or one with a gate: Shazeer (2020), "GLU Variants Improve
    Transformer", equation (6), with biases as everywhere here.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        activation, gated = _ACTIVATIONS[config.activation]
        self.inner = nn.Linear(config.d_model, config.feed_forward_width)
        self.gate = nn.Linear(config.d_model, config.feed_forward_width) if gated else None
        self.outer = nn.Linear(config.feed_forward_width, config.d_model)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); inside (B, L, F)."""
        if self.gate is None:
            return self.outer(self.activation(self.inner(x)))
        return self.outer(self.activation(self.gate(x)) * self.inner(x))


_ACTIVATIONS: dict[Activation, tuple[type[nn.Module], bool]] = {
    "gelu": (nn.GELU, False),
    "relu": (nn.ReLU, False),
    "geglu": (nn.GELU, True),
    "swiglu": (nn.SiLU, True),
}
"""Each with whether it is that of a gate."""


def new_norm(config: TransformerConfig) -> nn.LayerNorm | nn.RMSNorm:
    """LayerNorm, or RMSNorm: x / sqrt(mean(x^2) + eps), feature by feature times a weight."""
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.d_model, eps=1e-6)
    return nn.LayerNorm(config.d_model)


class Residual(nn.Module):
    """The sum around each sublayer and its norm, after the sum (post-norm) or before the sublayer (pre-norm)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = new_norm(config)
        self.dropout = Dropout(config.dropout)
        self.pre_norm = config.pre_norm

    def before(self, x: Tensor) -> Tensor:
        """What the sublayer reads: (B, L, D) -> (B, L, D)."""
        return self.norm(x) if self.pre_norm else x

    def after(self, x: Tensor, sublayer_output: Tensor) -> Tensor:
        """What the next sublayer gets: two (B, L, D) -> (B, L, D)."""
        x = x + self.dropout(sublayer_output)
        return x if self.pre_norm else self.norm(x)


class EncoderLayer(nn.Module):
    """Self-attention over the source, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, config.encoder_attention, causal=False)
        self.self_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        h = self.self_attention_residual.before(x)
        x = self.self_attention_residual.after(x, self.self_attention(h, positions))
        h = self.feed_forward_residual.before(x)
        return self.feed_forward_residual.after(x, self.feed_forward(h))


class DecoderLayer(nn.Module):
    """Causal self-attention over the target so far, attention over the memory, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, config.decoder_attention, causal=True)
        self.self_attention_residual = Residual(config)
        self.cross_attention = CrossAttention(config)
        self.cross_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        positions: Positions,
        source_mask: Tensor,
        rotations: tuple[Rotation, Rotation] | None,
    ) -> Tensor:
        """x (B, T, D), memory (B, S, D), source_mask (B, 1, 1, S), rotations of cross-attention's T queries and S keys
        -> (B, T, D).
        """
        h = self.self_attention_residual.before(x)
        x = self.self_attention_residual.after(x, self.self_attention(h, positions))
        h = self.cross_attention_residual.before(x)
        x = self.cross_attention_residual.after(x, self.cross_attention(h, memory, source_mask, rotations))
        h = self.feed_forward_residual.before(x)
        return self.feed_forward_residual.after(x, self.feed_forward(h))


class Embedding(nn.Module):
    """Token embedding scaled by sqrt(D), section 3.4, plus sinusoidal positions where these are added."""

    def __init__(self, tokens: nn.Embedding, length: int, config: TransformerConfig) -> None:
        """A length of 0 means that no positions are added."""
        super().__init__()
        self.tokens = tokens
        self.scale = math.sqrt(tokens.embedding_dim)
        self.dropout = Dropout(config.dropout)
        self.word_dropout = Dropout(config.word_dropout)
        positions = sinusoidal_positions(length, tokens.embedding_dim) if length else None
        self.register_buffer("positions", positions, persistent=False)
        self.positions: Tensor | None

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D)."""
        x = self.tokens(ids) * self.scale
        if self.training and self.word_dropout.probability:
            x = x * self.word_dropout(torch.ones_like(x[..., :1]))
        return self.dropout(x if self.positions is None else x + self.positions[: ids.size(1)])


class StackPositions(nn.Module):
    """What the self-attentions of a stack are told of positions."""

    def __init__(self, config: TransformerConfig, length: int, bidirectional: bool) -> None:
        """Of sequences up to this length."""
        super().__init__()
        self.bias: RelativeBias | None = None
        if config.positions == "relative_bias":
            self.bias = RelativeBias(
                config.num_heads, config.relative_buckets, config.relative_max_distance, bidirectional
            )
        cosines, sines = rotary_tables(length, config.d_head) if config.positions == "rotary" else (None, None)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.cosines: Tensor | None
        self.sines: Tensor | None

    @property
    def rotation(self) -> Rotation | None:
        """Of all positions, where they are rotary."""
        return None if self.cosines is None or self.sines is None else (self.cosines, self.sines)

    def forward(self, length: int, lengths: Tensor | None) -> Positions:
        """Of rows of this length, padding included."""
        if self.rotation is None:
            return Positions(lengths, self.bias)
        cosines, sines = self.rotation
        return Positions(lengths, self.bias, (cosines[:length], sines[:length]))


def mean_over_tokens(memory: Tensor, lengths: Tensor) -> Tensor:
    """memory (B, S, D), lengths (B,) -> the mean of each row's own tokens (B, D)."""
    valid = valid_tokens(lengths, memory.size(1)).unsqueeze(-1)  # (B, S, 1)
    return memory.masked_fill(~valid, 0).sum(dim=1) / lengths.clamp_min(1).unsqueeze(-1)


class Transformer(nn.Module):
    """The whole model. Source and target rows are padded on the right; the lengths say where they end."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        source_tokens = nn.Embedding(config.vocab_size, config.d_model)
        target_tokens = source_tokens if config.share_embeddings else nn.Embedding(config.vocab_size, config.d_model)
        # One place more than the limit: the start token stands before the tokens that are generated.
        lengths = config.max_source_tokens, config.max_target_tokens + 1
        added = lengths if config.positions == "sinusoidal" else (0, 0)
        self.source_embedding = Embedding(source_tokens, added[0], config)
        self.target_embedding = Embedding(target_tokens, added[1], config)
        self.source_positions = StackPositions(config, lengths[0], bidirectional=True)
        self.target_positions = StackPositions(config, lengths[1], bidirectional=False)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in set(config.encoder_order))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in set(config.decoder_order))
        self.encoder_norm = new_norm(config) if config.pre_norm else nn.Identity()
        self.decoder_norm = new_norm(config) if config.pre_norm and config.decoder_layers else nn.Identity()
        self.output_projection = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.share_embeddings:
            self.output_projection.weight = target_tokens.weight
        self.classifier = nn.Linear(config.d_model, len(config.labels)) if config.labels else None
        self.reset_parameters()

    @property
    def encoder_stack(self) -> list[EncoderLayer]:
        """The encoder's layers in the order in which they are applied: a shared one stands there several times."""
        return [cast(EncoderLayer, self.encoder[number]) for number in self.config.encoder_order]

    @property
    def decoder_stack(self) -> list[DecoderLayer]:
        """The same of the decoder."""
        return [cast(DecoderLayer, self.decoder[number]) for number in self.config.decoder_order]

    @property
    def different_decoder_layers(self) -> list[DecoderLayer]:
        """Each of the decoder's layers once."""
        return [cast(DecoderLayer, layer) for layer in self.decoder]

    def reset_parameters(self) -> None:
        """Xavier for projections (Glorot and Bengio, 2010), variance 1 / D for embeddings, which sqrt(D) scales, and
        for biases of positions. Queries, keys and values begin at half that variance, as if they were one matrix
        (3 D, D), which is how torch.nn.MultiheadAttention has them: scores start flatter, and a post-norm decoder with
        a high learning rate learns to look at its source.
        """
        halved = {
            projection
            for module in self.modules()
            if isinstance(module, MultiHeadAttention)
            for projection in (module.query, module.key, module.value)
        }
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if module in halved else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.tokens.weight, std=self.config.d_model**-0.5)
        for positions in (self.source_positions, self.target_positions):
            if positions.bias is not None:
                nn.init.normal_(positions.bias.table.weight, std=self.config.d_model**-0.5)

    def encode(self, source_ids: Tensor, source_lengths: Tensor) -> Tensor:
        """source_ids (B, S), source_lengths (B,) -> memory (B, S, D); what lies behind a row's length means nothing."""
        positions = self.source_positions(source_ids.size(1), source_lengths)
        x = self.source_embedding(source_ids)  # (B, S, D)
        for layer in self.encoder_stack:
            x = layer(x, positions)
        return self.encoder_norm(x)

    def classify(self, source_ids: Tensor, source_lengths: Tensor) -> Tensor:
        """source_ids (B, S), source_lengths (B,) -> logits (B, labels), of the mean of a source's tokens."""
        assert self.classifier is not None
        return self.classifier(mean_over_tokens(self.encode(source_ids, source_lengths), source_lengths))

    def decoder_states(self, target_ids: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """target_ids (B, T) from the start token on, memory (B, S, D) -> (B, T, D), what the projection reads."""
        source_mask = valid_tokens(source_lengths, memory.size(1))[:, None, None, :]  # (B, 1, 1, S)
        # Padding stands on the right, where no real token looks; the loss ignores the rest.
        positions = self.target_positions(target_ids.size(1), None)
        rotations = self._cross_rotations(target_ids.size(1), memory.size(1))
        x = self.target_embedding(target_ids)  # (B, T, D)
        for layer in self.decoder_stack:
            x = layer(x, memory, positions, source_mask, rotations)
        return self.decoder_norm(x)

    def _cross_rotations(self, target_length: int, source_length: int) -> tuple[Rotation, Rotation] | None:
        """Of cross-attention's queries and keys, by which scores depend on how far apart both stand."""
        if not self.config.rotary_cross_attention:
            return None
        of_target = self.target_positions(target_length, None).rotation
        of_source = self.source_positions(source_length, None).rotation
        assert of_target is not None
        assert of_source is not None
        return of_target, of_source

    def decode(self, target_ids: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """target_ids (B, T), memory (B, S, D) -> logits (B, T, V) of the token after each."""
        return self.output_projection(self.decoder_states(target_ids, memory, source_lengths))

    def next_token(self, target_ids: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """target_ids (B, T), memory (B, S, D) -> log-probabilities (B, V), fp32, of the token after the last."""
        states = self.decoder_states(target_ids, memory, source_lengths)[:, -1]  # (B, D)
        return self.output_projection(states).float().log_softmax(dim=-1)

    def forward(self, source_ids: Tensor, source_lengths: Tensor, target_ids: Tensor) -> Tensor:
        """source_ids (B, S), source_lengths (B,), target_ids (B, T) -> logits (B, T, V)."""
        return self.decode(target_ids, self.encode(source_ids, source_lengths), source_lengths)

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())
