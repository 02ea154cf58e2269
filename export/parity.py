"""The parity check: PyTorch against ONNX Runtime on real sentences, and each row against itself in other batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from export.artifact_decoder import ArtifactDecoder
from export.comparison import Differences, differences, invariance
from export.profile import Precision
from export.sentences import Sentences
from model.evaluation import score_translations
from model.search import greedy_search
from model.transformer import Transformer

MOST_LOGIT_DIFFERENCE = 1e-3
MOST_SCORE_DIFFERENCE = 1e-4
MOST_ALIGNMENT_DIFFERENCE = 1e-4
MOST_DIFFERENCE_TO_STEPS = 0.25
LEAST_EQUAL_TOKENS = 0.999
MOST_BLEU_DIFFERENCE = 0.2


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
    differences: Differences
    equal_tokens: float
    """Share of the places of PyTorch's and the variant's greedy translations that hold the same token."""
    bleu_pytorch: float
    bleu: float
    batch_invariant: bool
    """Every row's memory, logits, scores and alignment are the same bits alone and in a batch, in any order."""
    padding_invariant: bool
    """They are also the same bits at any padding, with any ids behind the source's end and the target's."""

    def failures(self) -> list[str]:
        """Each bound that is not kept, with the figure."""
        found = []
        if self.precision == "fp32":
            for what, difference, bound in (
                ("logits", self.differences.logits, MOST_LOGIT_DIFFERENCE),
                ("scores", self.differences.scores, MOST_SCORE_DIFFERENCE),
                ("alignments", self.differences.alignments, MOST_ALIGNMENT_DIFFERENCE),
            ):
                if not difference <= bound:
                    found.append(f"{what} differ by up to {difference:.3g}, allowed {bound:g}")
            if not self.equal_tokens >= LEAST_EQUAL_TOKENS:
                found.append(f"{self.equal_tokens:.3%} of the greedy tokens are equal, needed {LEAST_EQUAL_TOKENS:.1%}")
        else:
            if not abs(self.bleu - self.bleu_pytorch) <= MOST_BLEU_DIFFERENCE:
                found.append(
                    f"BLEU is {self.bleu:.2f}, {self.bleu_pytorch:.2f} in PyTorch: "
                    f"more than {MOST_BLEU_DIFFERENCE} apart"
                )
            if not self.differences.scores_to_steps <= MOST_DIFFERENCE_TO_STEPS:
                found.append(
                    f"scores differ by up to {self.differences.scores_to_steps:.3g} from those of the steps, "
                    f"allowed {MOST_DIFFERENCE_TO_STEPS}"
                )
        if not self.batch_invariant:
            found.append("a row's numbers depend on the other rows of its batch")
        return found

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "sentences": self.sentences,
            "largest_logit_difference": _three_digits(self.differences.logits),
            "largest_score_difference": _three_digits(self.differences.scores),
            "largest_score_difference_to_steps": _three_digits(self.differences.scores_to_steps),
            "largest_alignment_difference": _three_digits(self.differences.alignments),
            "equal_tokens": round(self.equal_tokens, 5),
            "bleu_pytorch": round(self.bleu_pytorch, 2),
            "bleu": round(self.bleu, 2),
            "batch_invariant": self.batch_invariant,
            "padding_invariant": self.padding_invariant,
        }

    def __str__(self) -> str:
        return (
            f"{self.sentences} sentences, logits within {self.differences.logits:.3g}, "
            f"scores within {self.differences.scores:.3g}, "
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
        differences(model, decoder, sentences.sources, reference.generated),
        equal_tokens(reference.generated, generated),
        reference.bleu,
        _bleu(tokenizer, generated, sentences),
        *invariance(decoder, sentences.sources, reference.generated),
    )


def equal_tokens(expected: list[list[int]], found: list[list[int]]) -> float:
    """Share of equal tokens, place by place; a place that only the longer of two translations has is unequal."""
    pairs = list(zip(expected, found, strict=True))
    equal = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    return equal / max(1, sum(max(len(one), len(other)) for one, other in pairs))


def _bleu(tokenizer: Tokenizer, generated: list[list[int]], sentences: Sentences) -> float:
    texts = tokenizer.decode_batch(generated, skip_special_tokens=True)
    bleu, _, _ = score_translations(texts, sentences.references)
    return bleu


def _three_digits(number: float) -> float:
    return float(f"{number:.3g}")
