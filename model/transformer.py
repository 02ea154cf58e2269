"""The encoder-decoder transformer of Vaswani et al. (2017), "Attention Is All You Need".

Letters in the shape comments: B rows of a batch, S source tokens, T target tokens, D = d_model, H heads,
K = D / H (d_k, the width of a head), F the feed-forward width, V the vocabulary.
Masks are boolean, True where a position may be attended to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import Activation, TransformerConfig


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, equation (1) of the paper: softmax(Q K^T / sqrt(d_k)) V.

    query (..., T, K), key (..., S, K), value (..., S, K), mask (..., T, S) -> output (..., T, K), weights (..., T, S).
    A query that may attend to nothing gets weights and output of zero.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (..., T, S)
    if mask is None:
        weights = scores.softmax(dim=-1)
        return weights @ value, weights
    # A softmax over nothing but -inf is NaN, in the gradient too: such rows attend to all, then count for nothing.
    any_valid = mask.any(dim=-1, keepdim=True)  # (..., T, 1)
    scores = scores.masked_fill(~(mask | ~any_valid), -math.inf)
    weights = scores.softmax(dim=-1) * any_valid  # (..., T, S)
    return weights @ value, weights


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Position encodings, section 3.5: sin(p / 10000^(2i/D)) on dimension 2i, cos on 2i + 1. Returns (length, D)."""
    position = torch.arange(length, dtype=torch.float64).unsqueeze(1)  # (length, 1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))  # (D/2,)
    angle = position * frequency  # (length, D/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(length, d_model).float()


def valid_tokens(lengths: Tensor, size: int) -> Tensor:
    """lengths (B,) -> (B, size), True at the first lengths[b] places of row b."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


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


class MultiHeadAttention(nn.Module):
    """Multi-head attention, section 3.2.2: H heads of width K, concatenated and projected."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, K)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D) asks, context (B, S, D) answers, mask broadcastable to (B, H, T, S) -> (B, T, D)."""
        query = self.split_heads(self.query(x))  # (B, H, T, K)
        key = self.split_heads(self.key(context))  # (B, H, S, K)
        value = self.split_heads(self.value(context))  # (B, H, S, K)
        heads, _ = attention(query, key, value, mask)  # (B, H, T, K)
        return self.output(heads.transpose(1, 2).flatten(2))  # (B, T, D)


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
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, 1, 1, S) -> (B, S, D)."""
        h = self.self_attention_residual.before(x)
        x = self.self_attention_residual.after(x, self.self_attention(h, h, mask))
        h = self.feed_forward_residual.before(x)
        return self.feed_forward_residual.after(x, self.feed_forward(h))


class DecoderLayer(nn.Module):
    """Causal self-attention over the target so far, attention over the memory, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_residual = Residual(config)
        self.cross_attention = MultiHeadAttention(config)
        self.cross_attention_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, memory: Tensor, target_mask: Tensor, source_mask: Tensor) -> Tensor:
        """x (B, T, D), memory (B, S, D), target_mask (B, 1, T, T), source_mask (B, 1, 1, S) -> (B, T, D)."""
        h = self.self_attention_residual.before(x)
        x = self.self_attention_residual.after(x, self.self_attention(h, h, target_mask))
        h = self.cross_attention_residual.before(x)
        x = self.cross_attention_residual.after(x, self.cross_attention(h, memory, source_mask))
        h = self.feed_forward_residual.before(x)
        return self.feed_forward_residual.after(x, self.feed_forward(h))


class Embedding(nn.Module):
    """Token embedding scaled by sqrt(D), plus sinusoidal positions, section 3.4 and 3.5."""

    def __init__(self, tokens: nn.Embedding, length: int, dropout: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.scale = math.sqrt(tokens.embedding_dim)
        self.dropout = Dropout(dropout)
        self.register_buffer("positions", sinusoidal_positions(length, tokens.embedding_dim), persistent=False)
        self.positions: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D)."""
        return self.dropout(self.tokens(ids) * self.scale + self.positions[: ids.size(1)])


class Transformer(nn.Module):
    """The whole model. Source and target rows are padded on the right; the lengths say where they end."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        source_tokens = nn.Embedding(config.vocab_size, config.d_model)
        target_tokens = source_tokens if config.share_embeddings else nn.Embedding(config.vocab_size, config.d_model)
        self.source_embedding = Embedding(source_tokens, config.max_source_tokens, config.dropout)
        # One place more than the limit: the start token stands before the tokens that are generated.
        self.target_embedding = Embedding(target_tokens, config.max_target_tokens + 1, config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.encoder_norm = new_norm(config) if config.pre_norm else nn.Identity()
        self.decoder_norm = new_norm(config) if config.pre_norm else nn.Identity()
        self.output_projection = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.share_embeddings:
            self.output_projection.weight = target_tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for projections (Glorot and Bengio, 2010), variance 1 / D for embeddings, which sqrt(D) scales."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.tokens.weight, std=self.config.d_model**-0.5)

    def encode(self, source_ids: Tensor, source_lengths: Tensor) -> Tensor:
        """source_ids (B, S), source_lengths (B,) -> memory (B, S, D); what lies behind a row's length means nothing."""
        mask = valid_tokens(source_lengths, source_ids.size(1))[:, None, None, :]  # (B, 1, 1, S)
        x = self.source_embedding(source_ids)  # (B, S, D)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decoder_states(self, target_ids: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """target_ids (B, T) from the start token on, memory (B, S, D) -> (B, T, D), what the projection reads."""
        length = target_ids.size(1)
        source_mask = valid_tokens(source_lengths, memory.size(1))[:, None, None, :]  # (B, 1, 1, S)
        # Padding stands on the right, so the causal mask hides it from every real token; the loss ignores the rest.
        target_mask = torch.ones(length, length, dtype=torch.bool, device=target_ids.device).tril()[
            None, None
        ]  # (1, 1, T, T)
        x = self.target_embedding(target_ids)  # (B, T, D)
        for layer in self.decoder:
            x = layer(x, memory, target_mask, source_mask)
        return self.decoder_norm(x)

    def decode(self, target_ids: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """target_ids (B, T), memory (B, S, D) -> logits (B, T, V) of the token after each."""
        return self.output_projection(self.decoder_states(target_ids, memory, source_lengths))

    def forward(self, source_ids: Tensor, source_lengths: Tensor, target_ids: Tensor) -> Tensor:
        """source_ids (B, S), source_lengths (B,), target_ids (B, T) -> logits (B, T, V)."""
        return self.decode(target_ids, self.encode(source_ids, source_lengths), source_lengths)

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())


def sequence_loss(logits: Tensor, targets: Tensor, pad_id: int, label_smoothing: float) -> Tensor:
    """Cross-entropy summed over the tokens that are not padding: logits (B, T, V), targets (B, T) -> ()."""
    return functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=pad_id,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
