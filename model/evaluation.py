"""How good translations are: BLEU and chrF by sacrebleu, against every reference that a sentence has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tokenizers import Tokenizer

from model.search import beam_search, greedy_search
from model.tokenizer import encode_texts
from model.transformer import Transformer

Translate = Callable[[list[list[int]]], list[list[int]]]
"""Source ids with their end token -> generated ids, in order."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of translations."""

    bleu: float
    chrf: float
    bleu_signature: str
    sentences: int
    target_tokens: int
    seconds: float
    translations: list[str]

    def __str__(self) -> str:
        rate = self.target_tokens / self.seconds if self.seconds else 0.0
        return (
            f"BLEU {self.bleu:.2f}  chrF {self.chrf:.2f}  {self.sentences} sentences  {self.target_tokens} tokens  "
            f"{rate:.0f} tokens/s  [{self.bleu_signature}]"
        )


def score_translations(translations: list[str], references: list[list[str]]) -> tuple[float, float, str]:
    """BLEU, chrF and the signature of BLEU. references[i] are all the references of sentence i, as many as it has."""
    most = max(map(len, references))
    # sacrebleu wants one list per reference number; a sentence with fewer references has None there.
    columns = [[refs[n] if n < len(refs) else None for refs in references] for n in range(most)]
    bleu, chrf = BLEU(), CHRF()
    return (
        bleu.corpus_score(translations, columns).score,
        chrf.corpus_score(translations, columns).score,
        str(bleu.get_signature()),
    )


def evaluate(translate: Translate, tokenizer: Tokenizer, eos_id: int, references: dict[str, list[str]]) -> Evaluation:
    """Translate every source and score it against all of its references."""
    sources = [[*ids, eos_id] for ids in encode_texts(tokenizer, references)]
    started = time.perf_counter()
    generated = translate(sources)
    seconds = time.perf_counter() - started
    translations = tokenizer.decode_batch(generated, skip_special_tokens=True)
    bleu, chrf, signature = score_translations(translations, list(references.values()))
    return Evaluation(bleu, chrf, signature, len(sources), sum(map(len, generated)), seconds, translations)


def translator(
    model: Transformer, num_beams: int = 1, length_penalty: float = 1.0, max_ratio: float = math.inf
) -> Translate:
    """The slow decoders of model.search as a function from sources to generated ids. max_ratio bounds greedy."""

    def translate(sources: list[list[int]]) -> list[list[int]]:
        if num_beams == 1:
            return [hypothesis.ids for hypothesis in greedy_search(model, sources, max_ratio=max_ratio)]
        return [best[0].ids for best in beam_search(model, sources, num_beams, length_penalty)]

    return translate
