"""Keys and values as int8, which a state holds in a quarter of the bytes: each feature has a scale of its own,
a constant that follows from the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.layers import SMALLEST_SCALE
from export.ops import Scales, signed
from export.spread import Activations
from model.attention import MultiHeadAttention

STATE_DEVIATIONS = 8.0
"""Keys and values are told apart up to so many deviations; what is beyond is cut off."""

HEADS_DEVIATIONS = 5.0
"""The same of what attention gives: means of values, which go less far than each by itself."""


class IntegerState(nn.Module):
    """The scales of one attention's keys and values."""

    def __init__(self, trained: MultiHeadAttention, context: Activations, rotated: bool = False) -> None:
        """`context` is what keys and values are made of; keys may be rotated before they are kept."""
        super().__init__()
        shape = (1, trained.num_kv_heads, 1, -1)
        key, value = (
            context.through(layer).bound(STATE_DEVIATIONS).reshape(shape) for layer in (trained.key, trained.value)
        )
        if rotated:  # either side of a plane can become as long as the two together
            sides = torch.stack(key.chunk(2, dim=-1)).norm(dim=0)
            key = torch.cat([sides, sides], dim=-1)
        self.register_buffer("key", (key / 127).clamp_min(SMALLEST_SCALE))
        self.register_buffer("value", (value / 127).clamp_min(SMALLEST_SCALE))
        self.key: Tensor
        self.value: Tensor

    @property
    def scales(self) -> Scales:
        """As the operators want them."""
        return self.key, self.value

    def expand(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """int8 (B, G, C, K) -> float32."""
        return key.float() * self.key, value.float() * self.value

    def rounded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, T, G * K) -> what would come back from the state."""
        key_steps, value_steps = self.key.flatten(), self.value.flatten()
        return (
            signed(key * (1 / key_steps)).float() * key_steps,
            signed(value * (1 / value_steps)).float() * value_steps,
        )


def heads_bound(trained: MultiHeadAttention, context: Activations) -> float:
    """What no feature of an attention's output, before its last linear layer, goes beyond."""
    return float(context.through(trained.value).bound(HEADS_DEVIATIONS).max())


def in_steps(layer: nn.Linear, scale: Tensor) -> nn.Linear:
    """A linear layer whose outputs count steps of these scales, of any shape with as many numbers as it has outputs."""
    steps = scale.flatten()
    scaled = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        scaled.weight.copy_(layer.weight / steps[:, None])
        scaled.bias.copy_(layer.bias / steps)
    return scaled
