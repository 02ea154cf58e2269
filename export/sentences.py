"""The real sentences that an export is checked on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from export.errors import ExportError
from model.config import TransformerConfig
from model.data import BadRows, DataError, grouped_references, read_pairs
from model.tokenizer import encode_texts

FEWEST = 500


@dataclass(frozen=True)
class Sentences:
    """Distinct source texts, their token ids with the end token, and all the references of each."""

    texts: list[str]
    sources: list[list[int]]
    references: list[list[str]]

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer, config: TransformerConfig) -> Sentences:
        """Read a TSV file (source, tab, reference), plain or gzipped. Sources above the model's limit are left out."""
        try:
            grouped = grouped_references(read_pairs((path,), BadRows()))
        except DataError as error:
            raise ExportError(str(error)) from error
        found = cls([], [], [])
        for (text, references), ids in zip(grouped.items(), encode_texts(tokenizer, grouped), strict=True):
            if len(ids) < config.max_source_tokens:
                found.texts.append(text)
                found.sources.append([*ids, config.eos_id])
                found.references.append(references)
        if len(found.texts) < FEWEST:
            raise ExportError(
                f"{path} has {len(found.texts)} different sentences of at most {config.max_source_tokens} tokens; "
                f"the parity check needs at least {FEWEST}: lines of a source sentence, a tab and its translation"
            )
        return found
