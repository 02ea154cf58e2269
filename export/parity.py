"""The parity check: PyTorch against ONNX Runtime on real sentences, and each row against itself in other batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from export.artifact_decoder import ArtifactDecoder
from export.profile import Precision
from export.sentences import Sentences
from model.data import pad_rows
from model.evaluation import score_translations
from model.search import greedy_search
from model.transformer import Transformer

MOST_LOGIT_DIFFERENCE = 1e-3
LEAST_EQUAL_TOKENS = 0.999
MOST_BLEU_DIFFERENCE = 0.2

BATCH_SHAPES = ((1, 0), (2, 5), (7, 0), (16, 24), (33, 0), (64, 40))
"""Rows of a batch, and how many places it is padded beyond its longest source."""

INVARIANCE_ROWS = 32


@dataclass(frozen=True)
class Reference:
    """What PyTorch says: greedy translations in float32, and their BLEU."""

    generated: list[list[int]]
    bleu: float


@dataclass(frozen=True)
class Figures:
    """How far one variant is from PyTorch."""

    precision: Precision
    sentences: int
    largest_logit_difference: float
    equal_tokens: float
    """Share of the places of PyTorch's and the variant's greedy translations that hold the same token."""
    bleu_pytorch: float
    bleu: float
    batch_invariant: bool
    """Every row's memory and logits are the same bits alone and in a batch, in any order."""
    padding_invariant: bool
    """They are also the same bits at any padding, with any ids behind the source's end."""

    def failures(self) -> list[str]:
        """Each bound that is not kept, with the figure."""
        found = []
        if self.precision == "fp32":
            if not self.largest_logit_difference <= MOST_LOGIT_DIFFERENCE:
                found.append(
                    f"logits differ by up to {self.largest_logit_difference:.3g}, allowed {MOST_LOGIT_DIFFERENCE:g}"
                )
            if not self.equal_tokens >= LEAST_EQUAL_TOKENS:
                found.append(f"{self.equal_tokens:.3%} of the greedy tokens are equal, needed {LEAST_EQUAL_TOKENS:.1%}")
        elif not abs(self.bleu - self.bleu_pytorch) <= MOST_BLEU_DIFFERENCE:
            found.append(
                f"BLEU is {self.bleu:.2f}, {self.bleu_pytorch:.2f} in PyTorch: more than {MOST_BLEU_DIFFERENCE} apart"
            )
        if not self.batch_invariant:
            found.append("a row's logits depend on the other rows of its batch")
        return found

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "sentences": self.sentences,
            "largest_logit_difference": float(f"{self.largest_logit_difference:.3g}"),
            "equal_tokens": round(self.equal_tokens, 5),
            "bleu_pytorch": round(self.bleu_pytorch, 2),
            "bleu": round(self.bleu, 2),
            "batch_invariant": self.batch_invariant,
            "padding_invariant": self.padding_invariant,
        }

    def __str__(self) -> str:
        return (
            f"{self.sentences} sentences, logits within {self.largest_logit_difference:.3g}, "
            f"{self.equal_tokens:.3%} equal greedy tokens, BLEU {self.bleu:.2f} (PyTorch {self.bleu_pytorch:.2f}), "
            f"rows {'independent of' if self.batch_invariant else 'DEPEND on'} their batch"
        )


def reference_translations(model: Transformer, tokenizer: Tokenizer, sentences: Sentences) -> Reference:
    """Translate with PyTorch, greedily."""
    generated = [hypothesis.ids for hypothesis in greedy_search(model, sentences.sources)]
    return Reference(generated, _bleu(tokenizer, generated, sentences))


def measure(
    model: Transformer,
    decoder: ArtifactDecoder,
    precision: Precision,
    tokenizer: Tokenizer,
    sentences: Sentences,
    reference: Reference,
) -> Figures:
    """Run a variant's graphs over the sentences and compare them with the reference."""
    generated = [hypothesis.ids for hypothesis in decoder.greedy(sentences.sources)]
    return Figures(
        precision,
        len(sentences.sources),
        largest_logit_difference(model, decoder, sentences.sources, reference.generated),
        equal_tokens(reference.generated, generated),
        reference.bleu,
        _bleu(tokenizer, generated, sentences),
        *invariance(decoder, sentences.sources, reference.generated),
    )


def largest_logit_difference(
    model: Transformer, decoder: ArtifactDecoder, sources: list[list[int]], targets: list[list[int]]
) -> float:
    """Over every position of the targets, read by both decoders, in batches of several shapes, padded and not."""
    largest, start = 0.0, 0
    for rows, padding in cycle(BATCH_SHAPES):
        batch, wanted = sources[start : start + rows], targets[start : start + rows]
        start += rows
        if not batch:
            return largest
        expected = _torch_logits(model, batch, wanted)  # (B, T, V)
        encoded = decoder.encode(batch, padded_to=min(max(map(len, batch)) + padding, model.config.max_source_tokens))
        lengths = np.array([len(target) for target in wanted])
        for position, logits in enumerate(decoder.teacher_forced(encoded, wanted)):
            real = lengths > position
            difference = np.abs(expected[real, position] - logits[real]).max()
            # A NaN must not pass for a small difference.
            largest = max(largest, float(difference)) if np.isfinite(difference) else float("inf")
    raise AssertionError("unreachable: cycle does not end")


@torch.no_grad()
def _torch_logits(model: Transformer, sources: list[list[int]], targets: list[list[int]]) -> np.ndarray[Any, Any]:
    config = model.config
    inputs = pad_rows([[config.bos_id, *target[:-1]] for target in targets], config.pad_id)
    lengths = torch.tensor([len(source) for source in sources])
    logits: np.ndarray[Any, Any] = model(pad_rows(sources, config.pad_id), lengths, inputs).numpy()
    return logits


def equal_tokens(expected: list[list[int]], found: list[list[int]]) -> float:
    """Share of equal tokens, place by place; a place that only the longer of two translations has is unequal."""
    pairs = list(zip(expected, found, strict=True))
    equal = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    return equal / max(1, sum(max(len(one), len(other)) for one, other in pairs))


def invariance(decoder: ArtifactDecoder, sources: list[list[int]], targets: list[list[int]]) -> tuple[bool, bool]:
    """Whether rows have the same bits alone as in a batch of equal padding, and whether at any padding."""
    chosen = np.linspace(0, len(sources) - 1, INVARIANCE_ROWS, dtype=int).tolist()
    sources, targets = [sources[i] for i in chosen], [targets[i] for i in chosen]
    width = max(map(len, sources))
    together = list(_bits(decoder, sources, targets, width))
    order = list(range(len(sources)))[::-1]
    backwards = list(_bits(decoder, [sources[i] for i in order], [targets[i] for i in order], width))
    batch = all(_equal(together[i], backwards[place]) for place, i in enumerate(order))
    padding = True
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        batch = batch and _equal(together[i], next(_bits(decoder, [source], [target], width)))
        padding = padding and _equal(together[i], next(_bits(decoder, [source], [target], len(source), noise=i)))
    return batch, padding


def _bits(
    decoder: ArtifactDecoder, sources: list[list[int]], targets: list[list[int]], width: int, noise: int | None = None
) -> Iterator[list[bytes]]:
    """For each row the bytes of its memory and of its logits at every position."""
    if noise is not None:
        width = min(width + 1 + noise, decoder.manifest["max_source_tokens"])
    ids = np.full((len(sources), width), decoder.pad_id, dtype=np.int64)
    if noise is not None:
        ids[:] = np.random.default_rng(noise).integers(0, decoder.manifest["vocab_size"], ids.shape)
    for place, source in zip(ids, sources, strict=True):
        place[: len(source)] = source
    rows = decoder.encode_padded(ids, np.array([len(source) for source in sources]), ids.shape[1])
    memory = rows.memory
    steps = list(decoder.teacher_forced(rows, targets))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        yield [memory[row, : len(source)].tobytes(), *(step[row].tobytes() for step in steps[: len(target)])]


def _equal(one: list[bytes], other: list[bytes]) -> bool:
    return one == other


def _bleu(tokenizer: Tokenizer, generated: list[list[int]], sentences: Sentences) -> float:
    texts = tokenizer.decode_batch(generated, skip_special_tokens=True)
    bleu, _, _ = score_translations(texts, sentences.references)
    return bleu
