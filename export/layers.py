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


NORM_DEVIATIONS = 5.0
"""What a LayerNorm gives is told apart up to so many standard deviations; what is beyond is cut off."""


@dataclass(frozen=True)
class Bounded:
    """Activations that are known to lie within constant bounds, but for a few that may be cut off."""

    values: Tensor  # (..., K) float32
    scale: float
    """What one step of their integers, 0 to 255, stands for."""
    zero: int = 128
    """Which of these integers stands for zero."""

    @classmethod
    def up_to(cls, values: Tensor, bound: float) -> Bounded:
        """Of no larger magnitude than this."""
        return cls(values, bound / 127)

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype


def bounded(values: Tensor, bound: float | None) -> Tensor | Bounded:
    """Values of no larger magnitude than this, if that is known."""
    return values if bound is None else Bounded.up_to(values, bound)


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

    def multiply(self, x: Tensor | Bounded, bias: Tensor | None) -> Tensor:
        """x (..., K) float32 -> (..., N) float32, with a bias (N,) added.

        What is not bounded is quantised row by row, by its largest value.
        """
        weight = self.values.t()
        if isinstance(x, Bounded):
            integers = quantise(x.values, x.scale, x.zero)
            return integer_product(integers, weight, torch.tensor(x.scale), self.scale, x.zero, bias)
        # A row of zeros has a scale of zero: whatever integers it quantises to, the product with its scale is zero.
        scales = x.abs().amax(dim=-1, keepdim=True) * (1 / 127)  # (..., 1)
        y = integer_product(quantise_rows(x, scales, 128), weight, scales, self.scale, 128)
        return y if bias is None else y + bias


class IntegerLinear(nn.Module):
    """One or several linear layers of the same input, side by side, as one product of integers."""

    def __init__(self, matrix: IntegerMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor | Bounded) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.matrix.multiply(x, self.bias)


class FloatLinear(nn.Module):
    """The same in floating point."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return functional.linear(x, self.weight, self.bias)


def fused_linear(layers: Sequence[nn.Linear], integer: bool) -> nn.Module:
    """Linear layers of one input as one: their outputs stand side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = torch.cat([layer.bias.detach() for layer in layers])
    return IntegerLinear(IntegerMatrix(weight), bias) if integer else FloatLinear(weight, bias)


def last_linear(layer: nn.Linear, integer: bool) -> nn.Module:
    """The last linear layer of a sublayer. In floating point its bias is left to the residual sum."""
    return fused_linear([layer], integer) if integer else FloatLinear(layer.weight.detach(), None)


class TokenEmbedding(nn.Module):
    """The trained token embedding and its positions, the tokens in float or, if a matrix is given, in integers."""

    def __init__(self, embedding: Embedding, matrix: IntegerMatrix | None) -> None:
        super().__init__()
        self.tokens = embedding.tokens if matrix is None else None
        self.matrix = matrix
        self.scale = embedding.scale
        positions = embedding.positions
        self.positions = None if positions is None else nn.Parameter(positions.detach().clone(), requires_grad=False)

    def look_up(self, ids: Tensor) -> Tensor:
        """ids (B, ...) -> (B, ..., D), scaled by sqrt(D), without positions."""
        if self.matrix is not None:
            return self.matrix.look_up(ids, self.scale)
        assert self.tokens is not None
        return rows_of(self.tokens.weight, ids) * self.scale

    def whole(self, ids: Tensor) -> Tensor:
        """ids (B, S), of positions 0 to S - 1 -> (B, S, D)."""
        x = self.look_up(ids)
        return x if self.positions is None else x + self.positions[: ids.shape[1]]

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B,) at positions (B,) -> (B, D)."""
        x = self.look_up(ids)
        return x if self.positions is None else x + rows_of(self.positions, positions)
