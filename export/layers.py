"""Embeddings and linear layers as the graphs compute them, in floating point or in 8-bit integers.

Letters in the shape comments: B rows, S tokens, D = d_model, K inputs and N outputs of a product, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.ops import integer_product, quantise, quantise_rows, rows_of
from model.transformer import Embedding

SMALLEST_SCALE = 1e-12
"""Of an output whose weights are all zero, which then quantise to zero instead of NaN."""


NORM_BOUND = 5.0
"""Standard deviations of what a LayerNorm gives that products of integers tell apart; what is beyond is cut off."""

LOW_ZERO = 20
"""Which of the integers 0 to 255 stands for zero where activations are hardly ever negative; else it is 128."""


@dataclass(frozen=True)
class Bounded:
    """Activations that are known to be no larger than a constant, but for a few that may be cut off.

    Integers of one scale for all of them will do: there is no need to look for the largest of each row.
    """

    values: Tensor  # (..., K) float32
    bound: float

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape


def bound_of(norm: nn.LayerNorm) -> float:
    """The bound of what a norm gives: its outputs have a mean and a standard deviation that its weights tell."""
    return float((NORM_BOUND * norm.weight.detach().abs() + norm.bias.detach().abs()).max())


def quantise_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) in -127..127 and a float32 scale per output (N,), so that weight = int8 * scale."""
    scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(SMALLEST_SCALE)  # (N,)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class IntegerMatrix(nn.Module):
    """An int8 matrix (N, K) with a scale per row, which can be looked up as an embedding and multiplied with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scale = quantise_outputs(weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.values: Tensor
        self.scale: Tensor

    def look_up(self, ids: Tensor, factor: float) -> Tensor:
        """ids (B, ...) -> factor times the rows (B, ..., K) float32."""
        return rows_of(self.values, ids).float() * rows_of((self.scale * factor).unsqueeze(-1), ids)

    def multiply(self, x: Tensor | Bounded, bias: Tensor | None, least: float | None) -> Tensor:
        """x (..., K) float32 -> (..., N) float32, with a bias (N,) added.

        What is not bounded is quantised row by row, by its largest value; `least` says how far below zero it can be, if
        that is less than above.
        """
        weight = self.values.t()
        if isinstance(x, Bounded):
            scale = x.bound / 127
            return integer_product(quantise(x.values, scale, 128), weight, torch.tensor(scale), self.scale, 128, bias)
        # A row of zeros has a scale of zero: whatever integers it quantises to, the product with its scale is zero.
        if least is None:
            zero, scales = 128, x.abs().amax(dim=-1, keepdim=True) * (1 / 127)  # (..., 1)
        elif least == 0:
            zero, scales = 0, x.amax(dim=-1, keepdim=True) * (1 / 255)
        else:
            zero = LOW_ZERO
            scales = (x.amax(dim=-1, keepdim=True) * (1 / (255 - zero))).clamp_min(least / zero)
        y = integer_product(quantise_rows(x, scales, zero), weight, scales, self.scale, zero)
        return y if bias is None else y + bias


class IntegerLinear(nn.Module):
    """One or several linear layers of the same input, side by side, as one product of integers."""

    def __init__(self, matrix: IntegerMatrix, bias: Tensor | None, least: float | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.least = least

    def forward(self, x: Tensor | Bounded) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.matrix.multiply(x, self.bias, self.least)


class FloatLinear(nn.Module):
    """The same in floating point."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return functional.linear(x, self.weight, self.bias)


def fused_linear(
    layers: Sequence[nn.Linear], integer: bool, bias: bool = True, least: float | None = None
) -> nn.Module:
    """Linear layers of one input as one: their outputs stand side by side. The bias can be left to someone else.

    `least`: how far below zero the input can be, if that is known.
    """
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = torch.cat([layer.bias.detach() for layer in layers]) if bias else None
    return IntegerLinear(IntegerMatrix(weight), biases, least) if integer else FloatLinear(weight, biases)


class TokenEmbedding(nn.Module):
    """The trained token embedding and its positions, the tokens in float or, if a matrix is given, in integers."""

    def __init__(self, embedding: Embedding, matrix: IntegerMatrix | None) -> None:
        super().__init__()
        self.tokens = embedding.tokens if matrix is None else None
        self.matrix = matrix
        self.scale = embedding.scale
        self.positions = nn.Parameter(embedding.positions.detach().clone(), requires_grad=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """ids (B, ...) -> (B, ..., D), scaled by sqrt(D), without positions."""
        if self.matrix is not None:
            return self.matrix.look_up(ids, self.scale)
        assert self.tokens is not None
        return rows_of(self.tokens.weight, ids) * self.scale

    def whole(self, ids: Tensor) -> Tensor:
        """ids (B, S), of positions 0 to S - 1 -> (B, S, D)."""
        return self.look_up(ids) + self.positions[: ids.shape[1]]

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B,) at positions (B,) -> (B, D)."""
        return self.look_up(ids) + rows_of(self.positions, positions)
