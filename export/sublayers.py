"""The residual sums with their LayerNorms, and the one sublayer that encoder and decoder share.

A sublayer's last bias is not added by the sublayer but with the residual, which a GPU does in one kernel.
Letters in the shape comments: D = d_model, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from export.layers import Bounded, bound_of, fused_linear
from export.ops import skip_layer_norm
from export.profile import Profile
from model.transformer import FeedForward, Residual

GELU_LEAST = 0.17
"""How far below zero a GELU goes; a ReLU does not."""


class FeedForwardGraph(nn.Module):
    """The position-wise feed-forward network, without its last bias."""

    def __init__(self, trained: FeedForward, integer: bool) -> None:
        super().__init__()
        self.inner = fused_linear([trained.inner], integer)
        gelu = isinstance(trained.activation, nn.GELU)
        # The approximation by tanh is off by less than 0.0005, a fraction of what the integers round away.
        self.activation = nn.GELU(approximate="tanh") if gelu and integer else trained.activation
        self.outer = fused_linear([trained.outer], integer, bias=False, least=GELU_LEAST if gelu else 0.0)

    def forward(self, x: Tensor | Bounded) -> Tensor:
        """(..., D) -> (..., D); inside (..., F)."""
        y: Tensor = self.outer(self.activation(self.inner(x)))
        return y


class ResidualStream(nn.Module):
    """The residual sums and LayerNorms of a stack of sublayers, post-norm or pre-norm.

    Two tensors run through it: the sum, and what the next sublayer reads of it. In post-norm they are one.
    """

    def __init__(
        self, residuals: Sequence[Residual], last_linears: Sequence[nn.Linear], final: nn.Module, profile: Profile
    ) -> None:
        """For each sublayer its trained residual and its last linear layer; final is the stack's norm, or no norm."""
        super().__init__()
        self.fused = profile.fused_norms
        self.pre_norm = residuals[0].pre_norm
        norms: list[nn.Module] = [residual.norm for residual in residuals]
        self.first = norms[0] if self.pre_norm else nn.Identity()
        following = [*norms[1:], final] if self.pre_norm else norms
        self.norms = nn.ModuleList(following)
        self.bounds = [
            bound_of(norm) if profile.integer_products and isinstance(norm, nn.LayerNorm) else None
            for norm in (self.first, *following)
        ]
        self.biases = nn.ParameterList([linear.bias.detach() for linear in last_linears])

    def start(self, x: Tensor) -> tuple[Tensor, Tensor | Bounded]:
        """x (..., D) -> the sum and what the first sublayer reads."""
        return x, _read(self.first(x), self.bounds[0])

    def add(self, sublayer: int, total: Tensor, output: Tensor) -> tuple[Tensor, Tensor | Bounded]:
        """The sum so far and the sublayer's output, both (..., D) -> the sum and what the next sublayer reads."""
        norm, bias = self.norms[sublayer], self.biases[sublayer]
        if self.fused and isinstance(norm, nn.LayerNorm):
            normalised, total = skip_layer_norm(total, output, bias, norm)
        else:
            total = total + (output + bias)
            normalised = norm(total)
        return total if self.pre_norm else normalised, _read(normalised, self.bounds[sublayer + 1])


def _read(normalised: Tensor, bound: float | None) -> Tensor | Bounded:
    return normalised if bound is None else Bounded(normalised, bound)
