"""How large activations get, worked out from the weights alone, before any input is seen.

Whatever stands before it, a LayerNorm gives features of a known mean and deviation, and a linear layer makes of them
features whose mean and deviation follow, if the normalised features go their own ways. In trained models they do not
quite, which is why so many deviations are allowed for. Every linear layer of a transformer reads a LayerNorm's output,
or something no larger than a linear layer of one: attention gives means of values, an activation function hardly adds.
So integers of one scale will do for each, and nobody has to look for the largest of each row.

Letters in the shape comments: N outputs and K inputs of a linear layer, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from model.transformer import Embedding, Residual, Transformer


@dataclass(frozen=True)
class Spread:
    """Of some features."""

    mean: Tensor  # (N,)
    deviation: Tensor  # (N,)

    def bound(self, deviations: float) -> Tensor:
        """What the magnitude of each feature (N,) hardly ever exceeds."""
        return self.mean.abs() + deviations * self.deviation


class Activations(Protocol):
    """What linear layers read."""

    def through(self, linear: nn.Linear) -> Spread:
        """What such a layer makes of it."""


Norm: TypeAlias = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class Normalised:
    """A norm's output: features of unit variance, or of mean square one, times the norm's weight."""

    norm: Norm

    @property
    def spread(self) -> Spread:
        """Of its features."""
        scale = self.norm.weight.detach().float()
        shift = self.norm.bias.detach().float() if isinstance(self.norm, nn.LayerNorm) else torch.zeros_like(scale)
        return Spread(shift, scale.abs())

    def through(self, linear: nn.Linear) -> Spread:
        """As the protocol says. What a LayerNorm has normalised sums to zero, so what is common to a row of weights has
        no part.
        """
        weight, spread = linear.weight.detach().float(), self.spread
        weighted = weight * self.norm.weight.detach().float()  # (N, K)
        if isinstance(self.norm, nn.LayerNorm):
            weighted = weighted - weighted.mean(dim=1, keepdim=True)
        deviation = weighted.norm(dim=1)  # (N,)
        return Spread(_with_bias(weight @ spread.mean, linear), deviation)


@dataclass(frozen=True)
class Embedded:
    """Embedded tokens with their positions, which the first sublayer of a post-norm stack reads."""

    embedding: Embedding

    def through(self, linear: nn.Linear) -> Spread:
        """As the protocol says; here the deviation is a fourth of the farthest that any token goes at any position."""
        weight = linear.weight.detach().float()
        tables = [self.embedding.tokens.weight.detach().float() * self.embedding.scale]
        if self.embedding.positions is not None:
            tables.append(self.embedding.positions.float())
        mean, farthest = torch.zeros(len(weight)), torch.zeros(len(weight))
        for table in tables:
            outputs = table @ weight.T  # (V, N)
            mean += outputs.mean(dim=0)
            farthest += (outputs - outputs.mean(dim=0)).abs().amax(dim=0)
        return Spread(_with_bias(mean, linear), farthest / 4)


def _with_bias(mean: Tensor, linear: nn.Linear) -> Tensor:
    return mean if linear.bias is None else mean + linear.bias.detach().float()


def read_by(embedding: Embedding, residuals: list[Residual]) -> list[Activations]:
    """What each sublayer of a stack reads; an encoder alone has a stack of none."""
    if not residuals:
        return []
    if residuals[0].pre_norm:
        return [Normalised(residual.norm) for residual in residuals]
    return [Embedded(embedding), *(Normalised(residual.norm) for residual in residuals[:-1])]


def encoder_residuals(model: Transformer) -> list[Residual]:
    """Of every sublayer of the encoder, in order."""
    layers = model.encoder_stack
    return [part for layer in layers for part in (layer.self_attention_residual, layer.feed_forward_residual)]


def decoder_residuals(model: Transformer) -> list[Residual]:
    """Of every sublayer of the decoder, in order."""
    return [
        part
        for layer in model.decoder_stack
        for part in (layer.self_attention_residual, layer.cross_attention_residual, layer.feed_forward_residual)
    ]


def memory_of(model: Transformer) -> Activations:
    """What the encoder gives."""
    norm = model.encoder_norm
    return Normalised(norm if isinstance(norm, Norm) else encoder_residuals(model)[-1].norm)
