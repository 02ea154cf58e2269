"""How a variant computes and stores: the choices in which the graphs of one trained model differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Profile:
    """One variant's choices. export/README.md has the measurements behind them."""

    precision: Precision
    """What the manifest calls it."""
    arithmetic: torch.dtype
    """Of everything but integer products: also the element type of the decoder's state."""
    integer_products: bool
    """Products of uint8 activations, quantised row by row, and int8 weights, quantised output by output."""
    encoder_attention: Literal["attention", "multi_head"]
    self_attention: Literal["group_query", "scatter"]
    cross_attention: Literal["group_query", "rewriting", "attention"]
    stored: Literal["float32", "float16", "int8"]
    """Of the weight matrices in the file, where they are floating-point in the graph. Smaller ones are expanded at load."""


_CPU_ATTENTION = ("attention", "group_query", "group_query")

CPU: dict[Precision, Profile] = {
    "fp32": Profile("fp32", torch.float32, False, *_CPU_ATTENTION, stored="float32"),
    "fp16": Profile("fp16", torch.float32, False, *_CPU_ATTENTION, stored="float16"),
    "int8": Profile("int8", torch.float32, True, *_CPU_ATTENTION, stored="float16"),
}
"""The CPU has no fast float16 arithmetic: `fp16` computes in float32 with weights that were rounded to float16."""

CUDA: dict[Precision, Profile] = {
    # GroupQueryAttention has no float32 kernel on CUDA.
    "fp32": Profile("fp32", torch.float32, False, "multi_head", "scatter", "attention", stored="float32"),
    "fp16": Profile("fp16", torch.float16, False, "multi_head", "group_query", "rewriting", stored="float16"),
    "int8": Profile("fp16", torch.float16, False, "multi_head", "group_query", "rewriting", stored="int8"),
}
"""Of an int8 artifact, the CUDA variant computes in float16 with weights that were rounded to int8."""
