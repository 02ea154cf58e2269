"""PyTorch against the graphs on the same tokens, and each row of the graphs against itself in other batches.

Letters in the shape comments: B rows, S source tokens, T target tokens, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.artifact_decoder import Array, ArtifactDecoder
from model.attention import CrossAttention, attention
from model.data import pad_rows
from model.transformer import Transformer

BATCH_SHAPES = ((1, 0), (2, 5), (7, 0), (16, 24), (33, 0), (64, 40))
"""Rows of a batch, and how many places it is padded beyond its longest source and target."""

INVARIANCE_ROWS = 32


@dataclass
class Differences:
    """The largest differences over every position of every target."""

    logits: float = 0.0
    """Of the steps, to PyTorch."""
    scores: float = 0.0
    """The scorer's log-probabilities of the targets' tokens, to PyTorch."""
    scores_to_steps: float = 0.0
    """The same, to what the steps give."""
    alignments: float = 0.0
    """Of the scorer, to PyTorch's attention weights."""


def differences(
    model: Transformer, decoder: ArtifactDecoder, sources: list[list[int]], targets: list[list[int]]
) -> Differences:
    """Over every position of the targets, as PyTorch, the steps and the scorer read them, in batches of several shapes,
    padded and not.
    """
    found, start = Differences(), 0
    for rows, padding in cycle(BATCH_SHAPES):
        batch, wanted = sources[start : start + rows], targets[start : start + rows]
        start += rows
        if not batch:
            return found
        encoded = decoder.encode(batch, padded_to=min(max(map(len, batch)) + padding, model.config.max_source_tokens))
        logits, alignment = _torch_reads(model, decoder.manifest["alignment_layer"], batch, wanted)
        padded = min(max(map(len, wanted)) + padding, model.config.max_target_tokens)
        scores = decoder.score(encoded, wanted, padded_to=padded)
        for position, stepped in enumerate(decoder.teacher_forced(encoded, wanted)):
            real = [row for row, target in enumerate(wanted) if len(target) > position]
            tokens = [wanted[row][position] for row in real]
            expected, attended = logits[real, position], np.zeros((len(real), scores.alignment.shape[2]))
            attended[:, : alignment.shape[2]] = alignment[real, position]
            score, stepped = scores.log_probabilities[real, position], stepped[real]
            found.logits = _larger(found.logits, expected, stepped)
            found.scores = _larger(found.scores, _log_probabilities(expected, tokens), score)
            found.scores_to_steps = _larger(found.scores_to_steps, _log_probabilities(stepped, tokens), score)
            found.alignments = _larger(found.alignments, attended, scores.alignment[real, position])
    raise AssertionError("unreachable: cycle does not end")


def _larger(so_far: float, expected: Array, found: Array) -> float:
    """The larger of a difference and those here; a NaN must not pass for a small one."""
    difference = float(np.abs(expected - found).max())
    return max(so_far, difference) if np.isfinite(difference) else float("inf")


def _log_probabilities(logits: Array, tokens: list[int]) -> Array:
    """logits (B, V), a token for each row -> their log-probabilities (B,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    of_tokens: Array = wide[np.arange(len(tokens)), tokens] - np.log(np.exp(wide).sum(axis=1))
    return of_tokens


@torch.no_grad()
def _torch_reads(
    model: Transformer, alignment_layer: int, sources: list[list[int]], targets: list[list[int]]
) -> tuple[Array, Array]:
    """Logits (B, T, V), and how much each position attends to the source in a layer, mean of the heads (B, T, S)."""
    config = model.config
    inputs = pad_rows([[config.bos_id, *target[:-1]] for target in targets], config.pad_id)
    lengths = torch.tensor([len(source) for source in sources])
    attended: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, CrossAttention)
        x, memory, mask, rotations = arguments
        query, key, _ = module.placed_heads(x, memory, rotations)
        attended.append(attention(query, key, key, mask)[1].mean(dim=1))

    order = config.decoder_order
    hook = model.decoder_stack[alignment_layer].cross_attention.register_forward_hook(look)
    try:
        logits = model(pad_rows(sources, config.pad_id), lengths, inputs)
    finally:
        hook.remove()
    # A layer that is shared was called for each of its places.
    earlier = order[:alignment_layer].count(order[alignment_layer])
    return logits.numpy(), attended[earlier].numpy()


def invariance(decoder: ArtifactDecoder, sources: list[list[int]], targets: list[list[int]]) -> tuple[bool, bool]:
    """Whether rows have the same bits alone as in a batch of equal padding, and whether at any padding."""
    chosen = np.linspace(0, len(sources) - 1, INVARIANCE_ROWS, dtype=int).tolist()
    sources, targets = [sources[i] for i in chosen], [targets[i] for i in chosen]
    widths = max(map(len, sources)), max(map(len, targets))
    together = list(_bits(decoder, sources, targets, widths))
    order = list(range(len(sources)))[::-1]
    backwards = list(_bits(decoder, [sources[i] for i in order], [targets[i] for i in order], widths))
    batch = all(_equal(together[i], backwards[place]) for place, i in enumerate(order))
    padding = True
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        batch = batch and _equal(together[i], next(_bits(decoder, [source], [target], widths)))
        # One target position by itself is the product of a matrix and a vector, whose sums are in another order.
        others = len(source) + 1 + i, min(max(len(target), 2) + i, decoder.max_target_tokens)
        padding = padding and _equal(together[i], next(_bits(decoder, [source], [target], others, noise=i)))
    return batch, padding


def _bits(
    decoder: ArtifactDecoder,
    sources: list[list[int]],
    targets: list[list[int]],
    widths: tuple[int, int],
    noise: int | None = None,
) -> Iterator[list[bytes]]:
    """For each row the bytes of its memory, of its logits at every position, and of its scores and alignment, with
    sources and targets padded to these widths.
    """
    width = min(widths[0], decoder.manifest["max_source_tokens"])
    ids = np.full((len(sources), width), decoder.pad_id, dtype=np.int64)
    if noise is not None:
        ids[:] = np.random.default_rng(noise).integers(0, decoder.manifest["vocab_size"], ids.shape)
    for place, source in zip(ids, sources, strict=True):
        place[: len(source)] = source
    rows = decoder.encode_padded(ids, np.array([len(source) for source in sources]), width)
    memory = rows.memory
    scores = decoder.score(rows, targets, padded_to=widths[1])
    steps = list(decoder.teacher_forced(rows, targets))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        yield [
            memory[row, : len(source)].tobytes(),
            *(step[row].tobytes() for step in steps[: len(target)]),
            scores.log_probabilities[row, : len(target)].tobytes(),
            scores.alignment[row, : len(target), : len(source)].tobytes(),
        ]


def _equal(one: list[bytes], other: list[bytes]) -> bool:
    return one == other
