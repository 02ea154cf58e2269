"""How a variant computes and stores: the choices in which the graphs of one trained model differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from model.config import TransformerConfig

Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Profile:
    """One variant's choices. export/README.md has the measurements behind them."""

    precision: Precision
    """What the manifest calls it."""
    arithmetic: torch.dtype
    """Of everything but integers; the element type of the decoder's state too, unless that is integers."""
    integer_products: bool
    """Products of uint8 activations, quantised by a constant, and int8 weights, quantised output by output."""
    integer_state: bool
    """Keys and values are kept as int8, quantised feature by feature: a quarter of the bytes that a step reads."""
    whole_attention: Literal["attention", "multi_head"]
    """Of all positions of a text at once, in the encoder and in the scorer."""
    self_attention: Literal["group_query", "scatter"]
    cross_attention: Literal["group_query", "rewriting", "attention"]
    fused_norms: bool
    """Residual sum, bias and LayerNorm as one operator: fewer launches on a GPU, but slower than three on the CPU."""
    stored: Literal["float32", "float16", "int8"]
    """Of the floating-point matrices, in the file: smaller types are expanded when it is loaded."""

    @property
    def integer_weights(self) -> bool:
        """Whether the matrices in the file are integers."""
        return self.integer_products or self.stored == "int8"

    def fitting(self, config: TransformerConfig) -> Profile:
        """The same for a model's heads: GroupQueryAttention takes widths that are multiples of 8, and rotates multiples
        of 16; others do without it.
        """
        if config.d_head % 8:
            return replace(self, self_attention="scatter", cross_attention="attention", integer_state=False)
        if config.positions == "rotary" and config.d_head % 16:
            return replace(self, self_attention="scatter", integer_state=False)
        return self


def _cpu(precision: Precision, stored: Literal["float32", "float16"]) -> Profile:
    return Profile(
        precision,
        arithmetic=torch.float32,
        integer_products=precision == "int8",
        integer_state=precision == "int8",
        whole_attention="attention",
        self_attention="group_query",
        cross_attention="group_query",
        fused_norms=False,
        stored=stored,
    )


def _cuda(stored: Literal["float16", "int8"]) -> Profile:
    return Profile(
        "fp16",
        arithmetic=torch.float16,
        integer_products=False,
        integer_state=False,
        whole_attention="multi_head",
        self_attention="group_query",
        cross_attention="rewriting",
        fused_norms=True,
        stored=stored,
    )


CPU: dict[Precision, Profile] = {
    "fp32": _cpu("fp32", "float32"),
    "fp16": _cpu("fp16", "float16"),
    "int8": _cpu("int8", "float16"),
}
"""The CPU has no fast float16 arithmetic: `fp16` computes in float32 with weights that were rounded to float16."""

CUDA: dict[Precision, Profile] = {
    # GroupQueryAttention has no float32 kernel on CUDA.
    "fp32": Profile("fp32", torch.float32, False, False, "multi_head", "scatter", "attention", True, "float32"),
    "fp16": _cuda("float16"),
    "int8": _cuda("int8"),
}
"""Of an int8 artifact, the CUDA variant computes in float16 with weights that were rounded to int8."""
