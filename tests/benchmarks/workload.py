"""What the engines are compared on: the models, each in every engine's form, and the texts."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import sacrebleu
from tokenizers import Tokenizer

from model.checkpoint import Checkpoint
from model.data import BadRows, grouped_references, read_pairs
from tests.benchmarks.base_model import LENGTH
from tests.benchmarks.ctranslate2_model import write_ctranslate2_model


@dataclass(frozen=True)
class Subject:
    """One set of weights and the texts that it translates."""

    name: str
    checkpoint: Path
    artifact: Path
    ctranslate2: Path
    texts: list[str]
    references: list[list[str]] | None
    """Of each text; None if the translations mean nothing."""
    few: int
    """So many of the texts are enough for an engine that is much slower."""
    length: int | None = None
    """Tokens of every answer, where the weights fix it."""

    @property
    def ctranslate2_limit(self) -> dict[str, int]:
        """What tells CTranslate2, whose models know no limit of their own, where they end."""
        return {} if self.length is None else {"max_decoding_length": self.length}

    @property
    def tokenizer_file(self) -> Path:
        """The artifact's, the same for all engines."""
        return self.artifact / "tokenizer.json"

    def tokens(self, texts: list[str]) -> int:
        """Tokens of these answers with their end tokens, counted alike for every engine: encoded again if need be."""
        if self.length is not None:
            return self.length * len(texts)
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        return sum(len(encoding.ids) + 1 for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def bleu(self, answers: list[str]) -> float | None:
        """Of answers to all the texts; None without references, or for a part of the texts."""
        if self.references is None or len(answers) < len(self.texts):
            return None
        columns = list(itertools.zip_longest(*self.references))
        return float(sacrebleu.corpus_bleu(answers, [list(column) for column in columns]).score)


def default_subject(checkpoint: Path, artifact: Path, sentences: Path, work: Path) -> Subject:
    """The trained model on sentences that training did not see."""
    references = _references(sentences)
    return Subject(
        "default",
        checkpoint,
        artifact,
        _converted(checkpoint, work / "default-ctranslate2"),
        list(references),
        list(references.values()),
        few=256,
    )


def base_subject(checkpoint: Path, artifact: Path, sentences: Path, work: Path, count: int = 384) -> Subject:
    """The base size with random weights, on so many of the same sentences."""
    texts = list(_references(sentences))
    converted = _converted(checkpoint, work / "base-ctranslate2")
    chosen = texts[:: max(1, len(texts) // count)][:count]
    return Subject("base", checkpoint, artifact, converted, chosen, None, few=32, length=LENGTH)


def _references(sentences: Path) -> dict[str, list[str]]:
    return grouped_references(read_pairs((sentences,), BadRows()))


def _converted(checkpoint: Path, directory: Path) -> Path:
    """The checkpoint for CTranslate2, int8, made anew if the checkpoint is newer."""
    made = directory / "model.bin"
    if not made.exists() or made.stat().st_mtime < checkpoint.stat().st_mtime:
        shutil.rmtree(directory, ignore_errors=True)
        write_ctranslate2_model(Checkpoint.load(checkpoint), directory, "int8")
    return directory
