"""The residual sums with their LayerNorms, and the one sublayer that encoder and decoder share.

A sublayer's last bias is added with the residual, which a GPU does in one kernel; by products of integers it comes for
nothing, so there the sublayer adds it.
Letters in the shape comments: D = d_model, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from export.layers import NORM_DEVIATIONS, SMALLEST_SCALE, Bounded, bounded, fused_linear, last_linear
from export.ops import skip_layer_norm
from export.profile import Profile
from export.spread import Activations, Norm, Normalised
from model.transformer import FeedForward, Residual

HIDDEN_DEVIATIONS = 6.0
"""The feed-forward network's hidden activations are told apart up to so many deviations above their mean."""

GELU_LEAST = 0.17
"""How far below zero a GELU goes; a ReLU does not."""

GELU_ZERO = 20
"""Which of the integers 0 to 255 stands for zero in what a GELU gives."""


class FeedForwardGraph(nn.Module):
    """The position-wise feed-forward network."""

    def __init__(self, trained: FeedForward, integer: bool, reads: Activations) -> None:
        super().__init__()
        layers = [trained.inner] if trained.gate is None else [trained.gate, trained.inner]
        self.inner = fused_linear(layers, integer)
        self.gated = trained.gate is not None
        gelu = isinstance(trained.activation, nn.GELU)
        # The approximation by tanh is off by less than 0.0005, a fraction of what the integers round away.
        self.activation = nn.GELU(approximate="tanh") if gelu and integer else trained.activation
        self.outer = last_linear(trained.outer, integer)
        self.steps: tuple[float, int] | None = None
        """Scale and zero of the hidden activations, where the weights tell them: of a product of two they do not."""
        if integer and not self.gated:
            hidden = reads.through(trained.inner)
            largest = float((hidden.mean + HIDDEN_DEVIATIONS * hidden.deviation).max())
            zero = GELU_ZERO if gelu else 0
            self.steps = max(largest / (255 - zero), GELU_LEAST / GELU_ZERO if gelu else SMALLEST_SCALE), zero

    def forward(self, x: Tensor | Bounded) -> Tensor:
        """(..., D) -> (..., D); inside (..., F)."""
        hidden = self.inner(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * value
        else:
            hidden = self.activation(hidden)
        y: Tensor = self.outer(hidden if self.steps is None else Bounded(hidden, *self.steps))
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
        self.bounds = [_bound_of(norm) if profile.integer_products else None for norm in (self.first, *following)]
        self.biases = (
            None if profile.integer_products else nn.ParameterList([linear.bias.detach() for linear in last_linears])
        )

    def start(self, x: Tensor) -> tuple[Tensor, Tensor | Bounded]:
        """x (..., D) -> the sum and what the first sublayer reads."""
        return x, bounded(self.first(x), self.bounds[0])

    def add(self, sublayer: int, total: Tensor, output: Tensor) -> tuple[Tensor, Tensor | Bounded]:
        """The sum so far and the sublayer's output, both (..., D) -> the sum and what the next sublayer reads."""
        norm = self.norms[sublayer]
        if self.biases is not None and self.fused and isinstance(norm, nn.LayerNorm):
            normalised, total = skip_layer_norm(total, output, self.biases[sublayer], norm)
        else:
            total = total + (output if self.biases is None else output + self.biases[sublayer])
            normalised = norm(total)
        return total if self.pre_norm else normalised, bounded(normalised, self.bounds[sublayer + 1])


def _bound_of(norm: nn.Module) -> float | None:
    """None where there is no norm."""
    return float(Normalised(norm).spread.bound(NORM_DEVIATIONS).max()) if isinstance(norm, Norm) else None
