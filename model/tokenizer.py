"""The tokenizer: byte-level BPE (Sennrich et al., 2016; bytes as in Radford et al., 2019), by the `tokenizers` library.

Bytes as the alphabet make every Unicode text representable and reversible, so there is no unknown token. The tokens
that mean something to the model are never the result of encoding a text, even of a text that spells them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
"""In the order of their ids: 0, 1, 2."""

_SURROGATES = dict.fromkeys(range(55296, 57344), "�")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from texts that are read once. The result has exactly vocab_size tokens if the texts allow it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
