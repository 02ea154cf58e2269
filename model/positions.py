"""Where a token stands, told to a transformer in three ways: added to its embedding, as a bias of each attention score,
or by rotating queries and keys.

Letters in the shape comments: L positions, D = d_model, H heads, K the width of a head, T queries, S keys.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 10000.0

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of L positions, both (L, K/2)."""


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Vaswani et al. (2017), section 3.5: sin(p / 10000^(2i/D)) on dimension 2i, cos on 2i + 1. Returns (L, D)."""
    position = torch.arange(length, dtype=torch.float64).unsqueeze(1)  # (L, 1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))  # (D/2,)
    angle = position * frequency  # (L, D/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(length, d_model).float()


def rotary_tables(length: int, width: int) -> Rotation:
    """Cosines and sines, both (L, K/2), of the angles p * 10000^(-2i/K): Su et al. (2021), section 3.2.2."""
    frequency = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # (K/2,)
    angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequency  # (L, K/2)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (..., K) turned by angles (..., K/2): feature i and feature i + K/2 are the two sides of a plane.

    The paper turns neighbours, which is the same up to the order of the features.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def rotate_heads(x: Tensor, width: int, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (..., L, heads * K) rotated by angles (L, K / 2), head by head."""
    heads = x.reshape(*x.shape[:-1], x.shape[-1] // width, width)
    return rotate(heads, cosines[:, None], sines[:, None]).flatten(-2)


class RelativeBias(nn.Module):
    """A learnt number for each head and each bucket of distances, added to the scores: Raffel et al. (2020), 2.1.

    Half of the buckets hold one distance each, the others ever more, up to `max_distance`, beyond which all are in the
    last one. A decoder looks only back; an encoder has half of the buckets for either direction.
    """

    def __init__(self, num_heads: int, buckets: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, num_heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def buckets(self, distances: Tensor) -> Tensor:
        """Position of the key minus that of the query, int64 of any shape -> the bucket of each."""
        count = self.table.num_embeddings
        ahead: Tensor | int = 0
        if self.bidirectional:
            count //= 2
            ahead = (distances > 0).long() * count
            distances = distances.abs()
        else:
            distances = (-distances).clamp_min(0)
        exact = count // 2
        # The comparisons of integers decide, where a logarithm in float32 might fall on either side of a bound.
        bounds = self._bounds(exact, count).to(distances.device)  # (count - exact - 1,)
        far = exact + (distances.unsqueeze(-1) >= bounds).sum(dim=-1)
        return ahead + torch.where(distances < exact, distances, far)

    def _bounds(self, exact: int, count: int) -> Tensor:
        """The least distance of each bucket after the first that holds several."""
        steps = count - exact
        ratio = self.max_distance / exact
        found = [math.ceil(exact * ratio ** (n / steps) - 1e-9) for n in range(1, steps)]
        return torch.tensor(found, dtype=torch.int64)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions of queries (..., T) and of keys (..., S) -> biases (..., H, T, S)."""
        farthest = self.max_distance
        by_distance = self.table(self.buckets(torch.arange(-farthest, farthest + 1, device=keys.device)))
        distances = (keys.unsqueeze(-2) - queries.unsqueeze(-1)).clamp(-farthest, farthest)  # (..., T, S)
        return functional.embedding(distances + farthest, by_distance).movedim(-1, -3)
