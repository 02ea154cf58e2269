"""One new position of the target attends to those before it: what the state holds of them, and how it is read.

Letters in the shape comments: B rows, D = d_model, H heads, G heads of keys and values, K = D / H, C a capacity,
W a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.integer_state import IntegerState, heads_bound
from export.layers import Bounded, bounded, fused_linear, last_linear
from export.ops import (
    Heads,
    cached_attention_over_lengths,
    cross_attention_step,
    rows_of,
    self_attention_step,
    tensor_scatter,
)
from export.profile import Profile
from export.spread import Activations
from model.attention import SelfAttention, counted, mean_of, positive_features
from model.positions import Rotation, rotate
from model.transformer import StackPositions

Step = tuple[Tensor, list[Tensor]]
"""What the sublayer gives (B, 1, D), and the state of its layer with the new position."""


@dataclass(frozen=True)
class Places:
    """Where each row is, in the forms that the attention operators want; worked out once for all layers."""

    positions: Tensor  # (B,) int64, of the new position
    lengths: Tensor  # (B,) int64, of the source
    last_target: Tensor  # (B,) int32, the new position
    last_source: Tensor  # (B,) int32, the source's last position
    target_capacity: Tensor  # () int32
    source_capacity: Tensor  # () int32; capacities bound the lengths, and are known without looking at any value
    bias: Tensor | None  # (B, H, 1, C or W), of the scores of positions of the target

    @classmethod
    def of(cls, positions: Tensor, lengths: Tensor, own: Tensor, source: Tensor, bias: Tensor | None) -> Places:
        """positions and lengths (B,), and any state tensor of the target and of the source, with capacities on axis 2
        if they have any.
        """
        target, source = (torch.scalar_tensor(state.shape[2], dtype=torch.int32) for state in (own, source))
        return cls(positions, lengths, positions.to(torch.int32), (lengths - 1).to(torch.int32), target, source, bias)


class StepAttention(nn.Module):
    """What the kinds of self-attention have in common."""

    def __init__(
        self, trained: SelfAttention, profile: Profile, context: Activations, positions: StackPositions
    ) -> None:
        """`context` is what it reads, `positions` what its stack knows of them."""
        super().__init__()
        self.heads = Heads.of(trained)
        self.packed = fused_linear([trained.query, trained.key, trained.value], profile.integer_products)
        self.output = last_linear(trained.output, profile.integer_products)
        self.bound = heads_bound(trained, context) if profile.integer_products else None
        self.positions = positions

    @property
    def rotation(self) -> Rotation | None:
        """The tables by which queries and keys are rotated."""
        return self.positions.rotation

    def query_key_value(self, x: Tensor | Bounded, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 1, D) at positions (B,) -> query (B, H, 1, K), key and value (B, G, 1, K), rotated."""
        packed = self.packed(x)  # (B, 1, (H + 2 * G) * K)
        queries, keys = self.heads.queries, self.heads.keys
        parts = packed.reshape(packed.shape[0], queries + 2 * keys, 1, -1)
        query, key, value = parts[:, :queries], parts[:, queries : queries + keys], parts[:, queries + keys :]
        if self.rotation is not None:
            angles = [rows_of(table, positions)[:, None, None] for table in self.rotation]  # two (B, 1, 1, K / 2)
            query, key = rotate(query, *angles), rotate(key, *angles)
        return query, key, value

    def give(self, heads: Tensor) -> Tensor:
        """heads (B, H, 1, K) or (B, 1, D) -> (B, 1, D), projected."""
        y: Tensor = self.output(bounded(heads.reshape(heads.shape[0], 1, -1), self.bound))
        return y


class CachedAttentionGraph(StepAttention):
    """Over all of the target so far, whose keys and values lie in a cache that grows."""

    def __init__(
        self, trained: SelfAttention, profile: Profile, context: Activations, positions: StackPositions
    ) -> None:
        super().__init__(trained, profile, context, positions)
        self.grouped = profile.self_attention == "group_query"
        self.state = (
            IntegerState(trained, context, rotated=self.rotation is not None) if profile.integer_state else None
        )

    def forward(self, x: Tensor | Bounded, places: Places, key: Tensor, value: Tensor) -> Step:
        """x (B, 1, D), caches (B, G, C, K)."""
        if self.grouped:
            heads, key, value = self_attention_step(
                self.packed(x),
                key,
                value,
                places.last_target,
                places.target_capacity,
                self.heads,
                None if self.state is None else self.state.scales,
                self.rotation,
                places.bias,
            )
            return self.give(heads), [key, value]
        query, new_key, new_value = self.query_key_value(x, places.positions)
        key = tensor_scatter(key, new_key, places.positions)
        value = tensor_scatter(value, new_value, places.positions)
        heads = cached_attention_over_lengths(query, key, value, places.positions + 1, places.bias)
        return self.give(heads), [key, value]


class RingAttentionGraph(StepAttention):
    """Over the last positions, whose keys and values lie in a ring: position p at place p modulo W."""

    def __init__(
        self, trained: SelfAttention, profile: Profile, context: Activations, positions: StackPositions
    ) -> None:
        super().__init__(trained, profile, context, positions)
        self.grouped = profile.cross_attention == "group_query"

    def forward(self, x: Tensor | Bounded, places: Places, key: Tensor, value: Tensor) -> Step:
        """x (B, 1, D), rings (B, G, W, K)."""
        size = key.shape[2]
        query, new_key, new_value = self.query_key_value(x, places.positions)
        key = tensor_scatter(key, new_key, places.positions % size)
        value = tensor_scatter(value, new_value, places.positions % size)
        filled = (places.positions + 1).clamp_max(size)
        if self.grouped:
            asked, last = query.reshape(query.shape[0], 1, -1), (filled - 1).to(torch.int32)
            heads = cross_attention_step(asked, key, value, last, places.target_capacity, self.heads, places.bias)
        else:
            heads = cached_attention_over_lengths(query, key, value, filled, places.bias)
        return self.give(heads), [key, value]


class RecurrentAttentionGraph(StepAttention):
    """Linear attention as a recurrence: Katharopoulos et al. (2020), equations (18) to (20). The state is the sum over
    the positions so far of what their keys say of their values, and of their keys.
    """

    def forward(self, x: Tensor | Bounded, places: Places, sums: Tensor) -> Step:
        """x (B, 1, D), sums (B, G, K, K + 1) float32."""
        query, key, value = (part.float() for part in self.query_key_value(x, places.positions))
        sums = sums + positive_features(key).transpose(2, 3) * counted(value)
        groups = query.reshape(query.shape[0], self.heads.keys, -1, query.shape[3])  # (B, G, H / G, K)
        heads = mean_of(positive_features(groups) @ sums)
        return self.give(heads.to(x.dtype)), [sums]


MakesStep = Callable[[SelfAttention, Profile, Activations, StackPositions], StepAttention]

STEP_ATTENTIONS: dict[str, MakesStep] = {
    "full": CachedAttentionGraph,
    "window": RingAttentionGraph,
    "linear": RecurrentAttentionGraph,
}
"""By the configuration's word."""
