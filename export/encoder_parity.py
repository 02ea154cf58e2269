"""The parity check of an encoder alone: its vectors, and its labels if it is a classifier.

Letters in the shape comments: B rows, S source tokens, D = d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.artifact_decoder import Array, open_session
from export.comparison import BATCH_SHAPES, INVARIANCE_ROWS
from export.profile import Precision
from model.data import pad_rows
from model.transformer import Transformer

LEAST_COSINE = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.99}
LEAST_EQUAL_LABELS = {"fp32": 0.999, "fp16": 0.99, "int8": 0.98}


class ArtifactEncoder:
    """The encoder's graph of one variant."""

    def __init__(self, graph: Path, threads: int = 0) -> None:
        self._session = open_session(graph, threads)
        self._names = [port.name for port in self._session.get_outputs()]

    def run(self, sources: Sequence[Sequence[int]], padded_to: int = 0, noise: int = 0) -> dict[str, list[Array]]:
        """Each output's own tokens of each source, (length, ...); behind its end stand ids of `noise`."""
        size = max(padded_to, *map(len, sources))
        ids = np.full((len(sources), size), noise, dtype=np.int64)
        for place, source in zip(ids, sources, strict=True):
            place[: len(source)] = source
        lengths = np.array([len(source) for source in sources])
        feeds = {"source_ids": ids, "source_lengths": lengths, "source_capacity": np.array(size)}
        outputs = dict(zip(self._names, self._session.run(None, feeds), strict=True))
        return {name: [row[:n] for row, n in zip(array, lengths, strict=True)] for name, array in outputs.items()}

    def labels(self, sources: Sequence[Sequence[int]]) -> list[int]:
        """The number of each source's likeliest label."""
        return [int(logits.mean(axis=0).argmax()) for logits in self.run(sources)["label_logits"]]


@dataclass(frozen=True)
class EncoderFigures:
    """How far one variant is from PyTorch."""

    precision: Precision
    sentences: int
    least_cosine: float
    """Of a sentence's mean vector to PyTorch's, the least of all sentences."""
    equal_labels: float
    """Share of the sentences whose likeliest label is PyTorch's; 1 where there are no labels."""
    batch_invariant: bool
    """Every row's numbers are the same bits alone and in a batch, at any padding, with any ids behind its end."""

    def failures(self) -> list[str]:
        """Each bound that is not kept, with the figure."""
        found = []
        for what, figure, bound in (
            ("least cosine of a vector to PyTorch's", self.least_cosine, LEAST_COSINE[self.precision]),
            ("share of equal labels", self.equal_labels, LEAST_EQUAL_LABELS[self.precision]),
        ):
            if not figure >= bound:
                found.append(f"{what} is {figure:.5f}, needed {bound}")
        if not self.batch_invariant:
            found.append("a row's numbers depend on the other rows of its batch or on its padding")
        return found

    def __str__(self) -> str:
        return (
            f"{self.sentences} sentences, vectors within a cosine of {self.least_cosine:.5f}, "
            f"{self.equal_labels:.2%} equal labels, rows "
            f"{'independent of' if self.batch_invariant else 'DEPEND on'} their batch"
        )

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            **asdict(self),
            "least_cosine": round(self.least_cosine, 6),
            "equal_labels": round(self.equal_labels, 5),
        }


def measure_encoder(
    model: Transformer, encoder: ArtifactEncoder, precision: Precision, sources: list[list[int]]
) -> EncoderFigures:
    """Run a variant's graph over the sources, in batches of several shapes, and compare it with PyTorch."""
    cosines: list[float] = []
    equal = start = 0
    for rows, padding in cycle(BATCH_SHAPES):
        batch = sources[start : start + rows]
        start += rows
        if not batch:
            break
        found = encoder.run(batch, padded_to=min(max(map(len, batch)) + padding, model.config.max_source_tokens))
        vectors, labels = _torch_reads(model, batch)
        for row, vector in enumerate(vectors):
            ours = found["memory"][row].mean(axis=0)
            cosines.append(float(ours @ vector / (np.linalg.norm(ours) * np.linalg.norm(vector))))
            equal += labels is None or int(found["label_logits"][row].mean(axis=0).argmax()) == labels[row]
    return EncoderFigures(
        precision, len(sources), min(cosines), equal / len(sources), _invariant(model, encoder, sources)
    )


@torch.no_grad()
def _torch_reads(model: Transformer, sources: list[list[int]]) -> tuple[Array, list[int] | None]:
    """Mean vectors (B, D), and the number of each likeliest label."""
    ids, lengths = pad_rows(sources, model.config.pad_id), torch.tensor([len(source) for source in sources])
    memory = model.encode(ids, lengths)
    vectors = torch.stack([row[:n].mean(dim=0) for row, n in zip(memory, lengths.tolist(), strict=True)]).numpy()
    labels = model.classify(ids, lengths).argmax(dim=1).tolist() if model.config.labels else None
    return vectors, labels


def _invariant(model: Transformer, encoder: ArtifactEncoder, sources: list[list[int]]) -> bool:
    chosen = [sources[i] for i in np.linspace(0, len(sources) - 1, INVARIANCE_ROWS, dtype=int)]
    together = encoder.run(chosen)
    for i, source in enumerate(chosen):
        padded = min(len(source) + 1 + i, model.config.max_source_tokens)
        alone = encoder.run([source], padded_to=padded, noise=3 + i % (model.config.vocab_size - 3))
        if any(alone[name][0].tobytes() != rows[i].tobytes() for name, rows in together.items()):
            return False
    return True
