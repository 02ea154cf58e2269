"""What teachers say of a batch's target tokens: worked out with each batch, or once before training and kept in a file.

Letters in the shape comments: B rows of a batch, S source tokens, T target tokens, N the target tokens of all rows
without padding, k the tokens that are kept of each distribution, D' a teacher's d_model, V the vocabulary.
"""

from __future__ import annotations

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


class KeptTeaching:
    """Of each target token of a corpus the `distillation_top` likeliest tokens, from a file that is mapped into memory:
    teachers cost one pass over the corpus, however many they are and however often it is gone over. The likeliest few
    do: Tan et al. (2019), "Multilingual Neural Machine Translation with Knowledge Distillation", have the top 8.
    """

    _ENTRY = np.dtype([("token", "<i4"), ("probability", "<f4")])

    def __init__(
        self, path: Path, teachers: Teachers, batches: Iterable[Batch], pairs: int, config: TrainingConfig
    ) -> None:
        """Have the teachers read the batches, which are all that training will see of a corpus of so many pairs."""
        self._config, self._vocab_size = config, teachers.vocab_size
        self._first = np.zeros(pairs, dtype=np.int64)  # (pairs,) where a pair's entries begin
        count = 0
        with path.open("wb") as file:
            for batch in batches:
                valid = batch.target_outputs != teachers.pad_id
                lengths = valid.sum(dim=1).cpu().numpy()
                self._first[batch.pairs] = count + lengths.cumsum() - lengths
                count += int(lengths.sum())
                said = teachers(batch, valid).said
                rows = block_rows(valid.device)
                for start in range(0, batch.target_tokens, rows):
                    probabilities, _ = said.block(slice(start, start + rows))
                    most = probabilities.topk(config.distillation_top)
                    entries = np.empty(most.indices.shape, dtype=self._ENTRY)  # (n, k)
                    entries["token"], entries["probability"] = most.indices.cpu(), most.values.cpu()
                    file.write(entries.tobytes())
        self._entries = np.memmap(path, dtype=self._ENTRY, mode="r").reshape(count, config.distillation_top)

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
