"""What teachers say of a batch's target tokens: worked out with each batch, or once before training and kept in a file.

Letters in the shape comments: B rows of a batch, S source tokens, T target tokens, N the target tokens of all rows
without padding, k the tokens that are kept of each distribution, D' a teacher's d_model, V the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from model.cross_entropy import Distillation, SaidInFull, SaidOfMost, block_rows
from model.data import Batch
from model.recipe import TrainingConfig
from model.transformer import Transformer

Teaching: TypeAlias = Callable[[Batch, Tensor], Distillation]
"""What is said of a batch where its target tokens are no padding, (B, T)."""


class Teachers:
    """They read each batch beside the model. Their weights stay as they are."""

    def __init__(self, models: Sequence[Transformer], config: TrainingConfig) -> None:
        self._models = [model.requires_grad_(False).eval() for model in models]
        self._config = config
        self.vocab_size, self.pad_id = models[0].config.vocab_size, models[0].config.pad_id

    def fingerprint(self) -> str:
        """Differs between teachers that say different things."""
        digest = hashlib.blake2b(digest_size=16)
        for model in self._models:
            digest.update(repr(model.config).encode())
            for name, weight in model.state_dict().items():
                digest.update(name.encode())
                digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, batch: Batch, valid: Tensor) -> Distillation:
        """As Teaching."""
        told = []
        for model in self._models:
            memory = model.encode(batch.source_ids, batch.source_lengths)  # (B, S, D')
            states = model.decoder_states(batch.target_inputs, memory, batch.source_lengths)[valid]  # (N, D')
            told.append((states, model.output_projection.weight))
        said = SaidInFull(told, self._config.distillation_temperature)
        return Distillation(said, self._config.distillation_weight)


def _index(path: Path) -> Path:
    return path.with_suffix(".npz")


class KeptTeaching:
    """Of each target token of a corpus the `distillation_top` likeliest tokens, from a file that is mapped into memory:
    teachers cost one pass over the corpus, however many they are and however often it is gone over. The likeliest few
    do: Tan et al. (2019), "Multilingual Neural Machine Translation with Knowledge Distillation", have the top 8.
    """

    _ENTRY = np.dtype([("token", "<i4"), ("probability", "<f4")])

    def __init__(self, path: Path, vocab_size: int, config: TrainingConfig) -> None:
        """Open what `write` wrote."""
        self._config, self._vocab_size = config, vocab_size
        with np.load(_index(path)) as index:
            self._first = index["first"]  # (pairs,) where a pair's entries begin
        self._entries = np.memmap(path, dtype=self._ENTRY, mode="r").reshape(-1, config.distillation_top)

    @classmethod
    def write(
        cls,
        path: Path,
        teachers: Teachers,
        batches: Iterable[Batch],
        pairs: int,
        config: TrainingConfig,
        made_of: str,
    ) -> KeptTeaching:
        """Have the teachers read the batches, which are all that training will see of a corpus of so many pairs.
        `made_of` is kept for `is_made_of`.
        """
        _index(path).unlink(missing_ok=True)
        first = np.zeros(pairs, dtype=np.int64)
        count = 0
        with path.open("wb") as file:
            for batch in batches:
                valid = batch.target_outputs != teachers.pad_id
                lengths = valid.sum(dim=1).cpu().numpy()
                first[batch.pairs] = count + lengths.cumsum() - lengths
                count += int(lengths.sum())
                said = teachers(batch, valid).said
                rows = block_rows(valid.device)
                for start in range(0, batch.target_tokens, rows):
                    probabilities, _ = said.block(slice(start, start + rows))
                    most = probabilities.topk(config.distillation_top)
                    entries = np.empty(most.indices.shape, dtype=cls._ENTRY)  # (n, k)
                    entries["token"], entries["probability"] = most.indices.cpu(), most.values.cpu()
                    file.write(entries.tobytes())
        # Last, and at once: where there is an index, what it leads to is whole.
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, first=first, made_of=made_of)
        partial.replace(_index(path))
        return cls(path, teachers.vocab_size, config)

    @staticmethod
    def is_made_of(path: Path, made_of: str) -> bool:
        """Whether a whole file stands there that was written with this."""
        if not (path.exists() and _index(path).exists()):
            return False
        with np.load(_index(path)) as index:
            return str(index["made_of"]) == made_of

    def __call__(self, batch: Batch, valid: Tensor) -> Distillation:
        """As Teaching."""
        lengths = valid.sum(dim=1).cpu().numpy()
        before = lengths.cumsum() - lengths  # (B,) tokens of the rows above
        places = np.repeat(self._first[batch.pairs] - before, lengths) + np.arange(batch.target_tokens)  # (N,)
        entries = self._entries[places]  # (N, k)
        tokens = torch.from_numpy(entries["token"].astype(np.int64)).to(valid.device)
        probabilities = torch.from_numpy(entries["probability"].copy()).to(valid.device)
        said = SaidOfMost(tokens, probabilities, self._vocab_size, self._config.distillation_temperature)
        return Distillation(said, self._config.distillation_weight)
