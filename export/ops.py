"""The ONNX operators that PyTorch has no word for, as functions on tensors that `torch.onnx.export` traces.

Outside an export these functions return tensors of the right shape without meaning: the graphs run in ONNX Runtime.
Letters in the shape comments: B rows, H heads, G heads of keys and values, K width of a head, C capacity of a cache, N
outputs of a product, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out

from model.attention import MultiHeadAttention
from model.positions import Rotation

Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]


@dataclass(frozen=True)
class Heads:
    """How many there are."""

    queries: int
    keys: int
    """And values. Each serves queries / keys neighbours."""

    @classmethod
    def of(cls, trained: MultiHeadAttention) -> Heads:
        """An attention's."""
        return cls(trained.num_heads, trained.num_kv_heads)

    def repeat(self, x: Tensor) -> Tensor:
        """Keys or values (B, S, G * K) -> (B, S, H * K), for operators that want as many as there are queries."""
        if self.queries == self.keys:
            return x
        batch, size, width = x.shape
        groups = x.reshape(batch, size, self.keys, 1, width // self.keys)
        return groups.expand(-1, -1, -1, self.queries // self.keys, -1).flatten(2)


FULL_MASK = -3.0e38
"""Finite, since ONNX Runtime adds it to scores in float32; so far below them that exp() makes an exact zero of it."""


def attention_over_lengths(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, heads: Heads, bias: Tensor | None = None
) -> Tensor:
    """Attention of opset 24, not causal, over the first lengths[b] keys of row b; query (B, S, H * K), key and value
    (B, S, G * K), bias (1, H, S, S).
    """
    attributes: Attributes = {"q_num_heads": heads.queries, "kv_num_heads": heads.keys}
    inputs = (query, key, value, bias, None, None, lengths)
    return symbolic("Attention", inputs, attributes, dtype=query.dtype, shape=query.shape, version=24)


def cached_attention_over_lengths(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same for keys and values as they lie in a cache: query (B, H, S, K), key and value (B, G, C, K), bias
    (B, H, S, C).
    """
    inputs = (query, key, value, bias, None, None, lengths)
    return symbolic("Attention", inputs, dtype=query.dtype, shape=query.shape, version=24)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, heads: Heads, bias: Tensor | None = None) -> Tensor:
    """Attention of opset 24, of each position to itself and those before it; query (B, S, H * K), key and value
    (B, S, G * K), bias (1, H, S, S).
    """
    attributes: Attributes = {"q_num_heads": heads.queries, "kv_num_heads": heads.keys, "is_causal": 1}
    return symbolic(
        "Attention", (query, key, value, bias), attributes, dtype=query.dtype, shape=query.shape, version=24
    )


def tensor_scatter(cache: Tensor, update: Tensor, positions: Tensor) -> Tensor:
    """Write update (B, G, 1, K) at positions (B,) of cache (B, G, C, K); in place if both are bound to one buffer."""
    return symbolic(
        "TensorScatter", (cache, update, positions), {"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=24
    )


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, heads: Heads, bias: Tensor | None = None
) -> Tensor:
    """com.microsoft.MultiHeadAttention over the first lengths[b] keys of row b; query (B, S, H * K), key and value
    (B, S, G * K), bias (1, H, S, S).
    """
    inputs = (query, heads.repeat(key), heads.repeat(value), None, lengths.to(torch.int32), bias)
    return symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        {"num_heads": heads.queries, "mask_filter_value": FULL_MASK},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def unidirectional_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: Heads, bias: Tensor | None = None
) -> Tensor:
    """com.microsoft.MultiHeadAttention, of each position to itself and those before it; query (B, S, H * K), key and
    value (B, S, G * K), bias (1, H, S, S).
    """
    return symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, heads.repeat(key), heads.repeat(value), None, None, bias),
        {"num_heads": heads.queries, "unidirectional": 1},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


Scales = tuple[Tensor, Tensor]
"""Of int8 keys and of int8 values, (1, G, 1, K) float32 each: what a step of each feature stands for."""


def self_attention_step(
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    bound: Tensor,
    heads: Heads,
    scales: Scales | None = None,
    rotation: Rotation | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """com.microsoft.GroupQueryAttention for one new position of each row.

    packed (B, 1, (H + 2 * G) * K) is query, new key and new value side by side; key and value (B, G, C, K) the caches,
    int8 if there are scales; last (B,) int32 the index of the new position, by which query and new key are rotated;
    bound () int32 no less than the longest row; bias (B, H, 1, C). Returns the output (B, 1, H * K) and both caches
    with the new position, in place if past and present are bound to one buffer.
    """
    batch, one, _ = packed.shape
    output, next_key, next_value = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (packed, None, None, key, value, last, bound, *_options(scales, rotation, bias)),
        _group_query(heads, scales, rotation),
        dtypes=(packed.dtype, key.dtype, value.dtype),
        shapes=((batch, one, heads.queries * key.shape[3]), key.shape, value.shape),
        version=1,
    )
    return output, next_key, next_value


def _group_query(heads: Heads, scales: Scales | None = None, rotation: Rotation | None = None) -> Attributes:
    attributes: Attributes = {"num_heads": heads.queries, "kv_num_heads": heads.keys}
    if scales is not None:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    if rotation is not None:
        attributes |= {"do_rotary": 1}
    return attributes


def _options(
    scales: Scales | None = None, rotation: Rotation | None = None, bias: Tensor | None = None
) -> list[Tensor | None]:
    """The operator's inputs after the seventh: tables of the rotation, positions, bias, sink, scales."""
    inputs = [*(rotation or (None, None)), None, bias, None, *(scales or (None, None))]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def cross_attention_step(
    query: Tensor, key: Tensor, value: Tensor, last: Tensor, bound: Tensor, heads: Heads, bias: Tensor | None = None
) -> Tensor:
    """com.microsoft.GroupQueryAttention of one query per row over a cache that is only read.

    query (B, 1, H * K), key and value (B, G, C, K), of which positions 0 to last[b] are attended to, bias (B, H, 1, C).
    New keys of length zero tell the operator that the cache is complete (ONNX Runtime of May 2026 or newer), so nothing
    is written back.
    """
    batch, _, width = query.shape
    nothing = query.new_zeros((batch, 0, heads.keys * key.shape[3]))
    (output,) = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, nothing, nothing, key, value, last, bound, *_options(bias=bias)),
        _group_query(heads),
        dtypes=(query.dtype,),
        shapes=((batch, 1, width),),
        version=1,
    )
    return output


def cross_attention_of_integers(
    query: Tensor, key: Tensor, value: Tensor, last: Tensor, bound: Tensor, heads: Heads, scales: Scales
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for key and value int8. Here the operator insists on giving both caches back, unchanged: in no time if
    they are bound to the buffers they came from. Returns the output (B, 1, H * K) and both.
    """
    batch, _, width = query.shape
    nothing = query.new_zeros((batch, 0, heads.keys * key.shape[3]))
    output, next_key, next_value = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, nothing, nothing, key, value, last, bound, *_options(scales)),
        _group_query(heads, scales),
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=((batch, 1, width), key.shape, value.shape),
        version=1,
    )
    return output, next_key, next_value


def cross_attention_rewriting(
    query: Tensor, key: Tensor, value: Tensor, last: Tensor, bound: Tensor, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with an operator that must be given a new key: the last valid one, which it writes back to its place.

    Works with every version of the operator. Returns the output (B, 1, H * K) and both caches, unchanged in content.
    """
    batch, groups, _, width = key.shape
    index = last.to(torch.int64)[:, None, None].expand(batch, groups, 1)  # (B, G, 1)
    newest = [
        symbolic(
            "GatherND", (cache, index), {"batch_dims": 2}, dtype=cache.dtype, shape=(batch, groups, width), version=13
        )
        for cache in (key, value)
    ]  # two (B, G, K)
    output, next_key, next_value = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, *(cache.reshape(batch, 1, groups * width) for cache in newest), key, value, last, bound),
        _group_query(heads),
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=(query.shape, key.shape, value.shape),
        version=1,
    )
    return output, next_key, next_value


def skip_layer_norm(x: Tensor, output: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """com.microsoft.SkipLayerNormalization: x and output (..., D), bias (D,) -> LayerNorm(their sum), and the sum."""
    normalised, _, _, total = symbolic_multi_out(
        "com.microsoft::SkipLayerNormalization",
        (x, output, norm.weight, norm.bias, bias),
        {"epsilon": norm.eps},
        dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
        shapes=(x.shape, (*x.shape[:-1], 1), (*x.shape[:-1], 1), x.shape),
        version=1,
    )
    return normalised, total


def quantise(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """x float32 of any shape -> uint8, all by one scale: half to even, saturated."""
    arguments = (x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8))
    return symbolic("QuantizeLinear", arguments, dtype=torch.uint8, shape=x.shape, version=21)


def signed(x: Tensor) -> Tensor:
    """x float32, in steps -> int8: half to even, saturated."""
    arguments = (x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int8))
    return symbolic("QuantizeLinear", arguments, dtype=torch.int8, shape=x.shape, version=21)


def quantise_rows(x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """The same, x (..., K), with a scale per row (..., 1)."""
    zero_points = torch.full(scale.shape, zero_point, dtype=torch.uint8)
    attributes: Attributes = {"axis": x.dim() - 1, "block_size": x.shape[-1]}  # one block is a whole row
    return symbolic("QuantizeLinear", (x, scale, zero_points), attributes, dtype=torch.uint8, shape=x.shape, version=21)


def integer_product(
    x: Tensor, weight: Tensor, scale: Tensor, column_scale: Tensor, zero_point: int, bias: Tensor | None = None
) -> Tensor:
    """x (..., K) uint8 of this zero point, weight (K, N) int8, scale () or (..., 1), column_scale (N,) float32
    -> (..., N) float32, and a bias (N,) added.

    With a scale per row the operator multiplies the bias by it too: then add the bias apart.
    """
    assert bias is None or scale.dim() == 0
    return symbolic(
        "com.microsoft::MatMulIntegerToFloat",
        (x, weight, scale, column_scale, torch.tensor(zero_point, dtype=torch.uint8), None, bias),
        dtype=torch.float32,
        shape=(*x.shape[:-1], weight.shape[1]),
        version=1,
    )


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """table (N, ...), ids of any shape -> the rows of the table, of shape ids.shape + table.shape[1:]."""
    return symbolic(
        "Gather", (table, ids), {"axis": 0}, dtype=table.dtype, shape=(*ids.shape, *table.shape[1:]), version=13
    )


def elements_of(table: Tensor, places: Tensor) -> Tensor:
    """table (A, B, ...), places (T, 2) -> table[a, b] for each pair of places: (T, ...)."""
    return symbolic(
        "GatherND", (table, places), dtype=table.dtype, shape=(places.shape[0], *table.shape[2:]), version=13
    )


def split_rows(x: Tensor, width: int) -> Tensor:
    """x (T, N * width) -> (T * N, width), without a look at T."""
    shape = (x.shape[0] * (x.shape[1] // width), width)
    return symbolic("Reshape", (x, torch.tensor([-1, width])), dtype=x.dtype, shape=shape, version=14)


def side_by_side(x: Tensor) -> Tensor:
    """x (B, k, M) -> (B, k * M), without a look at k."""
    shape = (x.shape[0], x.shape[1] * x.shape[2])
    return symbolic("Reshape", (x, torch.tensor([0, -1])), dtype=x.dtype, shape=shape, version=14)


def top(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The k () largest of each row of x (B, N), best first, of equals the lower index first: values and indices."""
    values, indices = symbolic_multi_out(
        "TopK",
        (x, k.reshape(1)),
        {"axis": -1, "largest": 1, "sorted": 1},
        dtypes=(x.dtype, torch.int64),
        shapes=((x.shape[0], 1), (x.shape[0], 1)),
        version=11,
    )
    return values, indices


def slices_of(x: Tensor, indices: Tensor) -> Tensor:
    """x (B, N, M), indices (B, k) -> x[b, indices[b]]: (B, k, M)."""
    shape = (*indices.shape, x.shape[2])
    attributes: Attributes = {"batch_dims": 1}
    return symbolic("GatherND", (x, indices.unsqueeze(-1)), attributes, dtype=x.dtype, shape=shape, version=13)


def arange(size: Tensor) -> Tensor:
    """0, 1, ... size () - 1, int64."""
    ends = torch.tensor(0), size, torch.tensor(1)
    return symbolic("Range", ends, dtype=torch.int64, shape=(8,), version=11)
