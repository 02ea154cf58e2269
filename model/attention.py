"""Attention, as the paper has it and as others have made it cheaper.

Letters in the shape comments: B rows of a batch, T queries, S keys, L positions of a sequence that attends to itself,
D = d_model, H heads, G heads of keys and values, K = D / H (d_k, the width of a head), M features.
Masks are boolean, True where a position may be attended to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import EncoderAttention, TransformerConfig
from model.positions import RelativeBias, Rotation, rotate


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, Vaswani et al. (2017), equation (1): softmax(Q K^T / sqrt(d_k) + bias) V.

    query (..., T, K), key and value (..., S, K), mask and bias broadcastable to (..., T, S) -> output (..., T, K),
    weights (..., T, S). A query that may attend to nothing gets weights and output of zero.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (..., T, S)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        weights = scores.softmax(dim=-1)
        return weights @ value, weights
    # A softmax over nothing but -inf is NaN, in the gradient too: such rows attend to all, then count for nothing.
    any_valid = mask.any(dim=-1, keepdim=True)  # (..., T, 1)
    scores = scores.masked_fill(~(mask | ~any_valid), -math.inf)
    weights = scores.softmax(dim=-1) * any_valid  # (..., T, S)
    return weights @ value, weights


def valid_tokens(lengths: Tensor, size: int) -> Tensor:
    """lengths (B,) -> (B, size), True at the first lengths[b] places of row b."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    window: int,
    global_tokens: int,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Each position attends to those at most window / 2 away and to the first `global_tokens`, which attend to all:
    Beltagy et al. (2020), "Longformer", with the same projections for both.

    query, key, value (B, H, L, K), lengths (B,) -> (B, H, L, K); L is a multiple of window / 2. Time and memory grow
    with L * window: positions stand in blocks of window / 2, and each block looks at itself and its two neighbours.
    What is behind a row's length means nothing, and is finite.
    """
    batch, heads, length, width = query.shape
    reach = window // 2
    count = length // reach

    def around(x: Tensor) -> Tensor:  # (B, H, L, K) -> (B, H, L / reach, 3 * reach, K), each block with its neighbours
        blocks = functional.pad(x, (0, 0, reach, reach)).view(batch, heads, count + 2, reach, width)
        return torch.cat([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], dim=3)

    own = torch.arange(reach, device=query.device)[:, None]  # (reach, 1), within the block
    other = torch.arange(-reach, 2 * reach, device=query.device)[None]  # (1, 3 * reach)
    places = torch.arange(count, device=query.device)[:, None] * reach + other  # (count, 3 * reach), in the row
    allowed = ((other - own).abs() <= reach) & (
        (places >= global_tokens) & (places < lengths[:, None, None])  # (B, count, 3 * reach)
    ).unsqueeze(2)  # (B, count, reach, 3 * reach)
    # Behind a row's end nothing would be left to attend to, and a softmax over nothing is NaN.
    allowed = (allowed | (other == own)).unsqueeze(1)  # (B, 1, count, reach, 3 * reach)
    blocks = query.view(batch, heads, count, reach, width)
    scores = blocks @ around(key).transpose(-2, -1) / math.sqrt(width)  # (B, H, count, reach, 3 * reach)
    if bias is not None:
        scores = scores + bias(own[:, 0], other[0])[:, None]
    scores = scores.masked_fill(~allowed, -math.inf)
    if global_tokens == 0:
        return (scores.softmax(dim=-1) @ around(value)).view(batch, heads, length, width)

    positions, starts = torch.arange(length, device=query.device), torch.arange(global_tokens, device=query.device)
    # Picked one by one, and not as slices: an exporter knows then how many there are.
    first_query, first_key, first_value = (part.index_select(2, starts) for part in (query, key, value))  # (B, H, g, K)
    first = query @ first_key.transpose(-2, -1) / math.sqrt(width)  # (B, H, L, g)
    if bias is not None:
        first = first + bias(positions, starts)
    exists = starts < lengths[:, None, None, None]  # (B, 1, 1, g)
    first = first.masked_fill(~exists, -math.inf).view(batch, heads, count, reach, global_tokens)
    weights = torch.cat([scores, first], dim=-1).softmax(dim=-1)
    near, far = weights[..., : 3 * reach], weights[..., 3 * reach :]
    local = (near @ around(value)).view(batch, heads, length, width)
    local = local + far.reshape(batch, heads, length, global_tokens) @ first_value

    everywhere, _ = attention(
        first_query,
        key,
        value,
        valid_tokens(lengths, length)[:, None, None],
        None if bias is None else bias(starts, positions),
    )  # (B, H, g, K)
    return torch.cat([everywhere, local[:, :, global_tokens:]], dim=2)


def positive_features(x: Tensor) -> Tensor:
    """elu(x) + 1, Katharopoulos et al. (2020), "Transformers are RNNs", equation (7): (..., K) -> (..., K)."""
    return functional.elu(x) + 1


def softmax_features(x: Tensor, directions: Tensor, valid: Tensor | None) -> Tensor:
    """Positive random features, whose products approximate exp(q k^T / sqrt(d_k)) up to a factor that a mean over the
    keys cancels: Choromanski et al. (2021), "Rethinking Attention with Performers", lemma 1 and appendix.

    x (B, H, L, K), directions (M, K) -> (B, H, L, M). The largest exponent is taken off so that none overflows: of each
    query by itself, of keys over all of a row, of which `valid` (B, 1, L, 1) says where they are.
    """
    x = x * x.size(-1) ** -0.25
    exponents = x @ directions.T - x.square().sum(dim=-1, keepdim=True) / 2  # (B, H, L, M)
    if valid is None:
        largest = exponents.amax(dim=-1, keepdim=True)
    else:
        largest = exponents.masked_fill(~valid, -math.inf).amax(dim=(-2, -1), keepdim=True)
    return (exponents - largest.detach()).clamp_max(0).exp() + 1e-6


def random_directions(features: int, width: int) -> Tensor:
    """Directions (M, K) for softmax_features: orthogonal within each K of them, as long as normal vectors are."""
    blocks = [torch.linalg.qr(torch.randn(width, width))[0].T for _ in range(-(-features // width))]
    lengths = torch.randn(features, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths


def linear_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """A mean of the values weighted by products of features: Katharopoulos et al. (2020), equations (4) to (6).

    query and key (B, H, L, M) not negative, value (B, H, L, K), valid (B, 1, L, 1) -> (B, H, L, K). Time and memory
    grow with L: what the keys say of the values is summed up first.
    """
    sums = (key * valid).transpose(-2, -1) @ counted(value)  # (B, H, M, K + 1)
    return mean_of(query @ sums)


def causal_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same over the positions up to each one, equations (9) to (12), all at once as training wants it."""
    weights = (query @ key.transpose(-2, -1)).tril()  # (B, H, L, L)
    return mean_of(weights @ counted(value))


def counted(value: Tensor) -> Tensor:
    """Values (..., K) with a one (..., K + 1), so that what sums them sums their weights too."""
    return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def mean_of(sums: Tensor) -> Tensor:
    """Sums of values and of their weights (..., K + 1) -> the means (..., K)."""
    return sums[..., :-1] / sums[..., -1:]


@dataclass(frozen=True)
class Positions:
    """What a stack's self-attentions know of where its tokens stand, worked out once for all layers."""

    lengths: Tensor | None
    """(B,); None in a decoder, where padding stands behind everything that looks back."""
    bias: RelativeBias | None = None
    rotation: Rotation | None = None


class MultiHeadAttention(nn.Module):
    """Multi-head attention, section 3.2.2: H heads of width K, concatenated and projected. With fewer heads of keys and
    values, H / G neighbours share one: Ainslie et al. (2023), "GQA"; Shazeer (2019) for one.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        narrow = config.kv_heads * config.d_head
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, narrow)
        self.value = nn.Linear(config.d_model, narrow)
        self.output = nn.Linear(config.d_model, config.d_model)

    def split_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """(B, L, heads * K) -> (B, heads, L, K)."""
        return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)

    def heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), context (B, S, D) -> query (B, H, T, K), key and value (B, G, S, K)."""
        return (
            self.split_heads(self.query(x), self.num_heads),
            self.split_heads(self.key(context), self.num_kv_heads),
            self.split_heads(self.value(context), self.num_kv_heads),
        )

    def for_all_heads(self, x: Tensor) -> Tensor:
        """(B, G, S, K) -> (B, H, S, K)."""
        groups = self.num_heads // self.num_kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)

    def merge(self, heads: Tensor) -> Tensor:
        """(B, H, L, K) -> (B, L, D), projected."""
        merged: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return merged


class CrossAttention(MultiHeadAttention):
    """Of target positions to the memory."""

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor, rotations: tuple[Rotation, Rotation] | None = None
    ) -> Tensor:
        """x (B, T, D), memory (B, S, D), mask (B, 1, 1, S), rotations of T and of S positions -> (B, T, D)."""
        query, key, value = self.placed_heads(x, memory, rotations)
        heads, _ = attention(query, key, value, mask)
        return self.merge(heads)

    def placed_heads(
        self, x: Tensor, memory: Tensor, rotations: tuple[Rotation, Rotation] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in forward -> query (B, H, T, K), key and value (B, H, S, K), both of the former rotated if they are."""
        query, key, value = self.heads(x, memory)
        if rotations is not None:
            query, key = rotate(query, *rotations[0]), rotate(key, *rotations[1])
        return query, self.for_all_heads(key), self.for_all_heads(value)


class SelfAttention(MultiHeadAttention):
    """Of a sequence to itself: of every position to all others, or in the encoder in one of the cheaper ways."""

    def __init__(self, config: TransformerConfig, kind: EncoderAttention, causal: bool) -> None:
        super().__init__(config)
        self.kind = kind
        self.causal = causal
        self.window = config.decoder_window if causal else config.encoder_window
        self.global_tokens = config.global_tokens
        if kind == "performer":
            self.register_buffer("directions", random_directions(config.random_features, config.d_head))
            self.directions: Tensor

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        query, key, value = self.heads(x, x)
        if positions.rotation is not None:
            query, key = rotate(query, *positions.rotation), rotate(key, *positions.rotation)
        key, value = self.for_all_heads(key), self.for_all_heads(value)
        return self.merge(self.attend(query, key, value, positions))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        """query, key, value (B, H, L, K) -> (B, H, L, K)."""
        length = query.size(2)
        if self.causal:
            if self.kind == "linear":
                return causal_linear_attention(positive_features(query), positive_features(key), value)
            places = torch.arange(length, device=query.device)
            mask = places[:, None] >= places
            if self.kind == "window":
                mask = mask & (places[:, None] - places < self.window)
            return attention(query, key, value, mask, _bias(positions.bias, places))[0]
        assert positions.lengths is not None
        if self.kind == "window":
            reach = self.window // 2
            padding = (0, 0, 0, -length % reach)
            query, key, value = (functional.pad(part, padding) for part in (query, key, value))
            heads = window_attention(
                query, key, value, positions.lengths, self.window, self.global_tokens, positions.bias
            )
            return heads[:, :, :length]
        valid = valid_tokens(positions.lengths, length)  # (B, L)
        if self.kind == "full":
            places = torch.arange(length, device=query.device)
            return attention(query, key, value, valid[:, None, None], _bias(positions.bias, places))[0]
        if self.kind == "linear":
            query, key = positive_features(query), positive_features(key)
        else:
            query = softmax_features(query, self.directions, None)
            key = softmax_features(key, self.directions, valid[:, None, :, None])
        return linear_attention(query, key, value, valid[:, None, :, None])


def _bias(bias: RelativeBias | None, places: Tensor) -> Tensor | None:
    return None if bias is None else bias(places, places)
