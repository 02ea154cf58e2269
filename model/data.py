"""Parallel text: read once as a stream, kept in a file mapped into memory, given out as batches of token ids.

A corpus of any size costs the process eight bytes a pair; the text itself stays in the operating system's page cache.
What a batch holds is decided by (seed, epoch) alone, so that a run can be continued at any batch.
"""

from __future__ import annotations

import gzip
import hashlib
import mmap
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from model.config import TransformerConfig
from model.recipe import TrainingConfig
from model.tokenizer import Segment


class DataError(ValueError):
    """Training data that cannot be used. The message names the file."""


@dataclass
class BadRows:
    """Rows that were left out: how many for which reason, and where the first of them stand."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row; keep its place if it is among the first five of its kind."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 5:
            examples.append(place)

    def __str__(self) -> str:
        return "; ".join(f"{n} rows {reason} ({', '.join(self.examples[reason])})" for reason, n in self.counts.items())


def _open(path: Path) -> BufferedIOBase:
    """The file's bytes, unpacked if it is gzipped (told by its first bytes, not its name)."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if packed else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def read_pairs(paths: tuple[Path, ...], bad: BadRows) -> Iterator[tuple[str, str]]:
    """Pairs of one TSV file (source, tab, target) or of two line-aligned files. Bad rows are counted and left out."""
    if len(paths) not in (1, 2):
        raise DataError(f"one TSV file or two aligned files are expected, not {len(paths)}")
    files = [_open(path) for path in paths]
    streams = [iter(file) for file in files]
    number = 0
    try:
        while True:
            number += 1
            lines = [next(stream, None) for stream in streams]
            if None in lines:
                if any(line is not None for line in lines):
                    raise DataError(f"{paths[0]} and {paths[1]} differ in length: one ends before line {number}")
                return
            place = f"{paths[0].name}:{number}"
            try:
                texts = [line.decode("utf-8").rstrip("\r\n") for line in lines if line is not None]
            except UnicodeDecodeError:
                bad.add("not UTF-8", place)
                continue
            columns = texts[0].split("\t") if len(texts) == 1 else texts
            if len(columns) < 2 or (len(texts) == 1 and len(columns) > 2):
                bad.add("not two columns", place)
            elif not all(column.strip() for column in columns):
                bad.add("with an empty side", place)
            else:
                yield columns[0].strip(), columns[1].strip()
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{paths[0]}: broken gzip stream after line {number - 1} ({error})") from error
    finally:
        for file in files:
            file.close()


def normalise_source(text: str) -> str:
    """What makes two source sentences the same for a split: case and punctuation do not count."""
    kept = (c for c in text.casefold() if not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split())


def split_of(source: str, share: float) -> str:
    """To valid or test (of each the share) or train, by a hash: all translations of a sentence go together."""
    digest = hashlib.blake2b(normalise_source(source).encode("utf-8", "replace"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "valid" if place < share else "test" if place < 2 * share else "train"


class Corpus:
    """Pairs by number, in a file of their bytes mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Open what `write` wrote."""
        self._offsets = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")  # (pairs + 1,) bytes
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def write(cls, path: Path, pairs: Iterable[tuple[str, str]]) -> Corpus:
        """Store the pairs under the path and open them. Raises DataError if there are none."""
        ends = np.zeros(1024, dtype=np.int64)
        count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for source, target in pairs:
                count += 1
                if count == len(ends):
                    ends = np.concatenate([ends, np.zeros_like(ends)])
                file.write(f"{source}\t{target}".encode())
                ends[count] = file.tell()
        if count == 0:
            raise DataError("no usable pair in the training data")
        np.save(path.with_suffix(".offsets.npy"), ends[: count + 1])
        return cls(path)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[str, str]:
        start, end = self._offsets[index : index + 2]
        source, target = self._bytes[start:end].decode("utf-8").split("\t", 1)
        return source, target

    def fingerprint(self) -> str:
        """Differs between corpora of different pairs, or of the same in another order."""
        digest = hashlib.blake2b(self._bytes, digest_size=16)
        digest.update(np.ascontiguousarray(self._offsets))
        return digest.hexdigest()

    def pairs(self) -> Iterator[tuple[str, str]]:
        """All of them, in order."""
        return (self[index] for index in range(len(self)))

    def texts(self) -> Iterator[str]:
        """Every source and target, for the tokenizer."""
        for pair in self.pairs():
            yield from pair


@dataclass(frozen=True)
class Batch:
    """Rows of similar length. Targets stand twice: as the decoder reads them, and one token later for the loss."""

    source_ids: Tensor  # (B, S) int64, end token included, padded
    source_lengths: Tensor  # (B,) int64
    target_inputs: Tensor  # (B, T) int64, beginning with the start token, padded
    target_outputs: Tensor  # (B, T) int64, ending with the end token, padded
    target_tokens: int  # not padding, in target_outputs
    pairs: list[int]  # B numbers in the corpus; of a paragraph, that of its first pair

    def repeated(self, times: int) -> Batch:
        """The rows so many times, one copy of all after the other."""
        if times == 1:
            return self
        return Batch(
            self.source_ids.repeat(times, 1),
            self.source_lengths.repeat(times),
            self.target_inputs.repeat(times, 1),
            self.target_outputs.repeat(times, 1),
            self.target_tokens * times,
            self.pairs * times,
        )

    def to(self, device: torch.device) -> Batch:
        """The same rows on a device."""
        return Batch(
            self.source_ids.to(device),
            self.source_lengths.to(device),
            self.target_inputs.to(device),
            self.target_outputs.to(device),
            self.target_tokens,
            self.pairs,
        )


def pad_rows(rows: list[list[int]], pad_id: int) -> Tensor:
    """Ids of each row -> (rows, longest) int64, padded on the right."""
    padded = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)


def _augment(
    pairs: list[tuple[str, str]], config: TrainingConfig, rng: np.random.Generator
) -> Iterator[tuple[int, str, str]]:
    """Join some pairs to paragraphs, then write some sources as people type: without capitals, without punctuation.
    Each text comes with the place of its first pair.
    """
    place = 0
    # A paragraph takes several pairs, so it must begin at fewer places than the share of pairs it ends up holding.
    mean = 1 + (1 - _GOES_ON ** (config.join_most - 1)) / (1 - _GOES_ON)
    begin = config.join_share / (config.join_share + mean * (1 - config.join_share))
    while place < len(pairs):
        count = 1
        if rng.random() < begin:
            count = min(1 + int(rng.geometric(1 - _GOES_ON)), config.join_most)
        taken = pairs[place : place + count]
        source, target = (" ".join(texts) for texts in zip(*taken, strict=True))
        if rng.random() < config.lowercase_share:
            source = source.lower()
        if rng.random() < config.unpunctuated_share:
            bare = source.rstrip(string.punctuation) if rng.random() < 0.5 else source.translate(_NO_PUNCTUATION)
            source = bare if bare.strip() else source
        yield place, source, target
        place += count


_GOES_ON = 0.7
"""Chance that a paragraph of two sentences or more has one more: short paragraphs are common, long ones rare."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation.replace("'", "").replace("-", ""))


_Row: TypeAlias = tuple[list[int], list[int], int]
"""Token ids of source and target, and the number of the pair."""


def epoch_batches(
    corpus: Corpus, segment: Segment, model: TransformerConfig, config: TrainingConfig, epoch: int, bad: BadRows
) -> Iterator[Batch]:
    """All pairs once, in batches of similar length and an order that (seed, epoch) fixes. Longer rows are left out."""
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(corpus))
    for start in range(0, len(order), config.pool_pairs):
        numbers = order[start : start + config.pool_pairs].tolist()
        places, sources, targets = zip(*_augment([corpus[n] for n in numbers], config, rng), strict=True)
        rows: list[_Row] = []
        tokenized = zip(places, segment(sources, rng), _targets(targets, segment, model, rng), strict=True)
        for place, source, target in tokenized:
            if len(source) + 1 > model.max_source_tokens or len(target) > model.max_target_tokens:
                bad.add("longer than the model's limits", f"epoch {epoch}")
            else:
                rows.append(([*source, model.eos_id], target, numbers[place]))
        # Rows of equal length stay in random order: each epoch cuts other batches.
        ties = rng.permutation(len(rows))
        by_length = sorted(ties, key=lambda i: (len(rows[i][1]), len(rows[i][0])))
        groups = list(_cut([rows[i] for i in by_length], config.batch_tokens))
        for index in rng.permutation(len(groups)):
            yield _batch(groups[index], model)


def _targets(
    texts: Sequence[str], segment: Segment, model: TransformerConfig, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Token ids with the end token, or the number of a label where the model has labels."""
    if model.labels:
        numbers = {label: number for number, label in enumerate(model.labels)}
        return ([numbers[text]] for text in texts)
    return ([*ids, model.eos_id] for ids in segment(texts, rng))


def _cut(rows: list[_Row], budget: int) -> Iterator[list[_Row]]:
    """Consecutive rows as long as neither side exceeds the budget in padded tokens; a row beyond it stands alone."""
    group: list[_Row] = []
    longest = 0
    for row in rows:
        longest_with = max(longest, len(row[0]), len(row[1]))
        if group and longest_with * (len(group) + 1) > budget:
            yield group
            group, longest_with = [], max(len(row[0]), len(row[1]))
        group.append(row)
        longest = longest_with
    if group:
        yield group


def _batch(rows: list[_Row], model: TransformerConfig) -> Batch:
    sources, targets, numbers = (list(column) for column in zip(*rows, strict=True))
    return Batch(
        source_ids=pad_rows(sources, model.pad_id),
        source_lengths=torch.tensor([len(source) for source in sources]),
        target_inputs=pad_rows([[model.bos_id, *target[:-1]] for target in targets], model.pad_id),
        target_outputs=pad_rows(targets, model.pad_id),
        target_tokens=sum(len(target) for target in targets),
        pairs=numbers,
    )


def grouped_references(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Each source with all its references, in the order of first sight."""
    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    return references
