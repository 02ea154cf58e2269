"""The tokenizer: byte-level BPE (Sennrich et al., 2016; bytes as in Radford et al., 2019), by the `tokenizers` library.

Bytes as the alphabet make every Unicode text representable and reversible, so there is no unknown token. The tokens
that mean something to the model are never the result of encoding a text, even of a text that spells them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
"""In the order of their ids: 0, 1, 2."""

_SURROGATES = dict.fromkeys(range(55296, 57344), "�")


_SPACES_AFTER = Regex(r"\p{L}+ ?|\p{N}+ ?|[^\s\p{L}\p{N}]+ ?|\s+")
"""Letters, digits or other characters, each with one space that follows; or any more spaces."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, spaces: Literal["before", "after"] = "before") -> Tokenizer:
    """Learn merges from texts that are read once. The result has exactly vocab_size tokens if the texts allow it.

    `spaces`: whether a space goes with the word behind it, as GPT-2 has it, or with the one before it.
    """
    tokenizer = Tokenizer(models.BPE())
    if spaces == "before":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(_SPACES_AFTER, behavior="isolated")
        of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, of_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. That special tokens are spelt out is not in the file: said here."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each text, without start or end token. Lone surrogates, which are no characters, become U+FFFD."""
    clean = [text.translate(_SURROGATES) for text in texts]
    for encoding in tokenizer.encode_batch_fast(clean, add_special_tokens=False):
        yield encoding.ids


Segment: TypeAlias = Callable[[Sequence[str], np.random.Generator], Iterable[list[int]]]
"""Token ids of each text, as training draws them."""


def segmenter(tokenizer: Tokenizer, bpe_dropout: float, seed: int) -> Segment:
    """How training cuts texts into tokens: as serving does, or at random by BPE-dropout."""
    if bpe_dropout:
        return BpeDropout(tokenizer, bpe_dropout, seed)
    return lambda texts, rng: encode_texts(tokenizer, texts)


class BpeDropout:
    """Texts in tokens at random: each time a word's next merge is looked for, each possible one is left out with this
    probability. Provilkov et al. (2020), "BPE-Dropout", algorithm 1.

    The library's own dropout draws from a generator that cannot be seeded, and a run is decided by its seed. A word's
    cuts are drawn once, so many as there are variants, and each occurrence takes one of them.
    """

    VARIANTS = 32

    def __init__(self, tokenizer: Tokenizer, probability: float, seed: int) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        self._ids: dict[str, int] = model["vocab"]
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        self._words = tokenizer.pre_tokenizer
        self._probability = probability
        self._seed = seed
        self._variants_of = lru_cache(maxsize=65536)(self._variants)

    def __call__(self, texts: Sequence[str], rng: np.random.Generator) -> Iterator[list[int]]:
        """Token ids of each text, without start or end token."""
        for text in texts:
            words = [word for word, _ in self._words.pre_tokenize_str(text.translate(_SURROGATES))]
            draws = rng.integers(self.VARIANTS, size=len(words)).tolist()
            yield [one for word, n in zip(words, draws, strict=True) for one in self._variants_of(word)[n]]

    def _variants(self, word: str) -> list[list[int]]:
        own = random.Random(f"{self._seed} {word}")  # the same whenever the word is met
        return [self._cut(word, own) for _ in range(self.VARIANTS)]

    def _cut(self, word: str, rng: random.Random) -> list[int]:
        symbols = list(word)
        while True:
            left_over = [
                (self._ranks[pair], place)
                for place, pair in enumerate(pairwise(symbols))
                if pair in self._ranks and rng.random() >= self._probability
            ]
            if not left_over:
                return [self._ids[symbol] for symbol in symbols]
            _, place = min(left_over)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
