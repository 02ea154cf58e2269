"""Embeddings and linear layers as the graphs compute them, in floating point or in 8-bit integers.

Letters in the shape comments: B rows, S tokens, D = d_model, K inputs and N outputs of a product, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.ops import integer_product, quantise_rows, rows_of
from model.transformer import Embedding

SMALLEST_SCALE = 1e-12
"""Of an output whose weights are all zero, which then quantise to zero instead of NaN."""


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

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) float32 -> (..., N) float32, each row of x quantised by its own largest value."""
        # A row of zeros has a scale of zero: whatever integers it quantises to, the product with its scale is zero.
        row_scale = x.abs().amax(dim=-1, keepdim=True) * (1 / 127)  # (..., 1)
        return integer_product(quantise_rows(x, row_scale), self.values.t(), row_scale, self.scale)


class IntegerLinear(nn.Module):
    """One or several linear layers of the same input, side by side, as one product of integers."""

    def __init__(self, matrix: IntegerMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = self.matrix.multiply(x)
        return y if self.bias is None else y + self.bias


class FloatLinear(nn.Module):
    """The same in floating point."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return functional.linear(x, self.weight, self.bias)


def fused_linear(layers: Sequence[nn.Linear], integer: bool, bias: bool = True) -> nn.Module:
    """Linear layers of one input as one: their outputs stand side by side. The bias can be left to someone else."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = torch.cat([layer.bias.detach() for layer in layers]) if bias else None
    return IntegerLinear(IntegerMatrix(weight), biases) if integer else FloatLinear(weight, biases)


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
