"""How good translations are: BLEU and chrF by sacrebleu, against every reference that a sentence has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from model.data import pad_rows
from model.search import Ensemble, batches_by_length, beam_search, greedy_search
from model.tokenizer import encode_texts
from model.transformer import Transformer, mean_over_tokens

Translate = Callable[[list[list[int]]], list[list[int]]]
"""Source ids with their end token -> generated ids, in order."""


RETRIEVED_AMONG = 1000
"""Translations, of which each source has to find its own."""


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


def score_translations(
    translations: list[str], references: list[list[str]], tokenize: str = "13a"
) -> tuple[float, float, str]:
    """BLEU, chrF and the signature of BLEU. references[i] are all the references of sentence i, as many as it has;
    `tokenize` is sacrebleu's: none for texts that are tokenised already.
    """
    most = max(map(len, references))
    # sacrebleu wants one list per reference number; a sentence with fewer references has None there.
    columns = [[refs[n] if n < len(refs) else None for refs in references] for n in range(most)]
    bleu, chrf = BLEU(tokenize=tokenize, force=True), CHRF()  # by force: no warning where texts are tokenised
    return (
        bleu.corpus_score(translations, columns).score,
        chrf.corpus_score(translations, columns).score,
        str(bleu.get_signature()),
    )


def evaluate(
    translate: Translate,
    tokenizer: Tokenizer,
    eos_id: int,
    max_source_tokens: int,
    references: dict[str, list[str]],
    tokenize: str = "13a",
) -> Evaluation:
    """Translate every source and score it against all of its references. Sources too long for the model are cut."""
    sources = _rows(tokenizer, references, eos_id, max_source_tokens)
    started = time.perf_counter()
    generated = translate(sources)
    seconds = time.perf_counter() - started
    translations = tokenizer.decode_batch(generated, skip_special_tokens=True)
    bleu, chrf, signature = score_translations(translations, list(references.values()), tokenize)
    return Evaluation(bleu, chrf, signature, len(sources), sum(map(len, generated)), seconds, translations)


def _rows(tokenizer: Tokenizer, texts: Iterable[str], eos_id: int, limit: int) -> list[list[int]]:
    return [[*ids[: limit - 1], eos_id] for ids in encode_texts(tokenizer, texts)]


def validate(model: Transformer, tokenizer: Tokenizer, references: dict[str, list[str]]) -> dict[str, float]:
    """How good a model is at what it is for, in per cent; the first figure is the one that decides.

    A classifier's accuracy; BLEU and chrF of greedy translations; of an encoder alone, retrieval.
    """
    if model.config.labels:
        return {"accuracy": accuracy(model, tokenizer, references)}
    if model.config.decoder_layers == 0:
        return {"retrieval": retrieval(model, tokenizer, references)}
    translate = translator(model, max_ratio=3.0)
    evaluation = evaluate(translate, tokenizer, model.config.eos_id, model.config.max_source_tokens, references)
    return {"bleu": evaluation.bleu, "chrf": evaluation.chrf}


@torch.no_grad()
def accuracy(model: Transformer, tokenizer: Tokenizer, references: dict[str, list[str]]) -> float:
    """Per cent of the texts whose likeliest label is one of those that they have in the data."""
    found = [int(logits.argmax()) for logits in _each(model.classify, model, tokenizer, list(references))]
    right = sum(
        model.config.labels[number] in labels for number, labels in zip(found, references.values(), strict=True)
    )
    return 100 * right / len(references)


@torch.no_grad()
def retrieval(
    model: Transformer, tokenizer: Tokenizer, references: dict[str, list[str]], among: int = RETRIEVED_AMONG
) -> float:
    """Per cent of the first sources whose nearest vector among the first so many targets is their own translation's.

    Vectors are means over a text's tokens, compared by cosine, as POST /v1/encode gives them.
    """
    pairs = {target: source for source, targets in references.items() for target in targets[:1]}  # a target once
    chosen = list(pairs.items())[:among]

    def vectors(source_ids: Tensor, lengths: Tensor) -> Tensor:
        return normalize(mean_over_tokens(model.encode(source_ids, lengths), lengths), dim=1)

    ours = torch.stack(_each(vectors, model, tokenizer, [source for _, source in chosen]))  # (N, D)
    theirs = torch.stack(_each(vectors, model, tokenizer, [target for target, _ in chosen]))
    nearest = (ours @ theirs.T).argmax(dim=1)
    return 100 * float((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean())


def _each(
    encode: Callable[[Tensor, Tensor], Tensor], model: Transformer, tokenizer: Tokenizer, texts: list[str]
) -> list[Tensor]:
    """What a function of padded ids and lengths gives for each text, in order; texts too long for the model are cut."""
    config, device = model.config, next(model.parameters()).device
    rows = _rows(tokenizer, texts, config.eos_id, config.max_source_tokens)
    found: dict[int, Tensor] = {}
    for indices in batches_by_length(rows, 64):
        ids = pad_rows([rows[i] for i in indices], config.pad_id).to(device)
        lengths = torch.tensor([len(rows[i]) for i in indices], device=device)
        found |= dict(zip(indices, encode(ids, lengths), strict=True))
    return [found[i] for i in range(len(texts))]


def translator(
    model: Transformer | Ensemble, num_beams: int = 1, length_penalty: float = 1.0, max_ratio: float = math.inf
) -> Translate:
    """The slow decoders of model.search as a function from sources to generated ids. max_ratio bounds greedy."""

    def translate(sources: list[list[int]]) -> list[list[int]]:
        if num_beams == 1:
            return [hypothesis.ids for hypothesis in greedy_search(model, sources, max_ratio=max_ratio)]
        return [best[0].ids for best in beam_search(model, sources, num_beams, length_penalty)]

    return translate
