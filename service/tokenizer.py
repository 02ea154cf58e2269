"""Text to token ids and back, by the artifact's tokenizer.json. Knows nothing of models.

Batches are tokenised without Python's interpreter lock, so long texts stall nobody if that is done in a thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

# Read at the first call. The engine's threads keep every processor busy: to hand a text over to yet another thread
# takes longer than tokenising it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tokenizers
from tokenizers import pre_tokenizers

from service.artifact import Artifact
from service.detokenizer import Detokenizer
from service.errors import ArtifactError
from service.patterns import Vocabulary

_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


class Tokenizer:
    """A byte-level BPE. Every text can be encoded, and no text becomes a special token."""

    def __init__(self, artifact: Artifact) -> None:
        path, special = artifact.tokenizer_path, artifact.manifest.special_tokens
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ArtifactError(f"{path} is not a tokenizer ({error}). Export the model again.") from None
        decoder = json.loads(path.read_bytes()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise ArtifactError(f"{path} has no ByteLevel decoder. Train the tokenizer with transduce train.")
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > artifact.manifest.vocab_size:
            raise ArtifactError(
                f"{path} has {size} tokens, the manifest's vocab_size is {artifact.manifest.vocab_size}. "
                "Export the model again, with the tokenizer it was trained with."
            )
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.eos_id = special.eos_id
        self._bytes = _token_bytes(
            self._tokenizer,
            artifact.manifest.vocab_size,
            set(special.model_dump().values()),
        )
        self.vocabulary = Vocabulary(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Source ids, the end token included. Lone surrogates, which are no characters, become U+FFFD.

        It keeps the interpreter's lock, 8 us for a sentence: to get it back from busy threads takes up to a hundred
        times as long.
        """
        return [*self._tokenizer.encode(_clean(text), add_special_tokens=False).ids, self.eos_id]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same of each text, without the interpreter's lock."""
        encodings = self._tokenizer.encode_batch_fast(list(map(_clean, texts)), add_special_tokens=False)
        return [[*encoding.ids, self.eos_id] for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids; special tokens, and ids that no token has, give nothing."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def token(self, id: int) -> str:
        """The text of one token by itself; U+FFFD stands for part of a character."""
        return self._bytes[id].decode("utf-8", errors="replace")

    def detokenizer(self, prefix: str = "", stop: Sequence[str] = ()) -> Detokenizer:
        """How the results of a request that begin with `prefix`, and end at one of the texts `stop`, become text."""
        return Detokenizer(self._bytes, prefix, [text.encode() for text in stop])


def _clean(text: str) -> str:
    return text if text.isascii() else text.translate(_SURROGATES)


def _token_bytes(tokenizer: tokenizers.Tokenizer, vocab_size: int, special: set[int]) -> list[bytes]:
    """The bytes of every token id; empty for special tokens and for ids that no token has."""
    alphabet = _alphabet()
    special |= {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    table = []
    for id in range(vocab_size):
        token = None if id in special else tokenizer.id_to_token(id)
        if token is None:
            table.append(b"")
        elif all(character in alphabet for character in token):
            table.append(bytes(alphabet[character] for character in token))
        else:
            table.append(token.encode())  # an added token: spelt as it is
    return table


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: a printable one itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
