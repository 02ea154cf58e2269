"""From the encoder's output to embeddings: pooling over a text's own tokens, length, wire format. numpy only.

Every function takes the vectors of one text by itself, (length, d) float32, so that no text can change another's bits.
"""

import base64
from typing import Literal

import numpy as np

from service.sequence import Floats

Pooling = Literal["mean", "max", "first", "none"]


def pool(memory: Floats, pooling: Pooling) -> Floats:
    """One vector (d,) of a text's token vectors (length, d); with "none", all of them."""
    if pooling == "mean":
        return np.asarray(memory.mean(axis=0, dtype=np.float32))
    if pooling == "max":
        return np.asarray(memory.max(axis=0))
    # Copied: what the engine gives is a view of a whole batch, which must not live as long as an answer.
    return memory[0].copy() if pooling == "first" else memory.copy()


def probabilities(logits: Floats) -> Floats:
    """A text's distribution over labels (labels,): the softmax of the mean of its tokens' logits (length, labels)."""
    mean = logits.mean(axis=0, dtype=np.float64)
    weights = np.exp(mean - mean.max())
    return np.asarray(weights / weights.sum(), np.float32)


def normalized(vectors: Floats) -> Floats:
    """Each vector (along the last axis) divided by its Euclidean length; a zero vector stays zero."""
    lengths = np.sqrt(np.sum(np.square(vectors, dtype=np.float64), axis=-1, keepdims=True))
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0, casting="same_kind"))


def as_base64(vectors: Floats) -> str:
    """The vectors' little-endian float32 bytes, row by row."""
    return base64.b64encode(vectors.astype("<f4", copy=False).tobytes()).decode("ascii")
