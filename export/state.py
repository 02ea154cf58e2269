"""The decoder's state as the manifest describes it: what each layer keeps of the target so far and of the source.

Letters in the shape comments: G heads of keys and values, K = d_head.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.config import TransformerConfig


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state; a row of it belongs to a running sequence."""

    name: str
    kind: Literal["cache", "source", "recurrent"]
    """cache: places that steps write, undefined before; source: written by the encoder; recurrent: zeros at first."""
    shape: tuple[int | str, ...]

    @property
    def has_capacity(self) -> bool:
        """Whether it grows with a text's length."""
        return any(isinstance(axis, str) for axis in self.shape[1:])


def target_state(config: TransformerConfig, layer: int) -> list[StateTensor]:
    """What a layer keeps of the target so far: keys and values of all positions (G, capacity, K), or of the last ones
    in a ring (G, window, K), or the sums of linear attention (G, K, K + 1).
    """
    heads, width = config.kv_heads, config.d_head
    if config.decoder_attention == "linear":
        return [StateTensor(f"self_sums_{layer}", "recurrent", ("rows", heads, width, width + 1))]
    places = ring_size(config) if config.decoder_attention == "window" else "target_capacity"
    shape = ("rows", heads, places, width)
    return [StateTensor(f"self_{what}_{layer}", "cache", shape) for what in ("key", "value")]


def source_state(config: TransformerConfig, layer: int) -> list[StateTensor]:
    """What a layer keeps of the source: its keys and values (G, capacity, K)."""
    shape = ("rows", config.kv_heads, "source_capacity", config.d_head)
    return [StateTensor(f"cross_{what}_{layer}", "source", shape) for what in ("key", "value")]


def state_of(config: TransformerConfig) -> list[StateTensor]:
    """Of all layers, in the order in which the decoder's graph takes them."""
    return [
        tensor
        for layer in range(config.decoder_layers)
        for tensor in (*target_state(config, layer), *source_state(config, layer))
    ]


def state_tensors(config: TransformerConfig) -> list[dict[str, Any]]:
    """The same as the manifest has it."""
    return [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in state_of(config)]


def ring_size(config: TransformerConfig) -> int:
    """Places of a window's ring, of which no more are needed than there can be positions."""
    return min(config.decoder_window, config.max_target_tokens)
