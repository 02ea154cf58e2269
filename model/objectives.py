"""What a run minimises: the loss of a batch, and the user's own by import path.

Letters in the shape comments: P passes, B rows of a batch, S source tokens, T target tokens, N the target tokens of all
rows without padding, D = d_model, V the vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import ConfigurationError
from model.cross_entropy import projected_cross_entropy
from model.data import Batch
from model.recipe import TrainingConfig
from model.teachers import Teaching
from model.transformer import Transformer, mean_over_tokens

Loss: TypeAlias = Callable[[Transformer, Batch, TrainingConfig], Tensor]
"""The loss of a batch, summed over its `target_tokens`: () float32. It is called under autocast, in training mode."""


class Objective(nn.Module):
    """The model with what it is trained for: what a process computes for each batch."""

    def __init__(self, model: Transformer, config: TrainingConfig, teaching: Teaching | None = None) -> None:
        """`teaching`: what is said by teachers with the model's vocabulary. Raises ConfigurationError."""
        super().__init__()
        if (config.distillation_weight > 0) != (teaching is not None):
            raise ConfigurationError("distillation_weight must be above 0 with a teacher (--teacher), and 0 without")
        self.model = model
        self.config = config
        self.loss = _LOSSES.get(config.loss) or _imported(config.loss)
        self.teaching = teaching
        """No module of this one: teachers are neither trained nor synchronised."""

    def forward(self, batch: Batch) -> Tensor:
        """The loss summed over the batch's target tokens, ()."""
        if self.teaching:
            return translation_loss(self.model, batch, self.config, self.teaching)
        return self.loss(self.model, batch, self.config)


def translation_loss(
    model: Transformer, batch: Batch, config: TrainingConfig, teaching: Teaching | None = None
) -> Tensor:
    """Cross-entropy with label smoothing; by the recipe's weights also what teachers say, and what makes the vectors
    of translations alike.
    """
    passes = 2 if config.r_drop else 1
    rows = batch.repeated(passes)
    memory = model.encode(rows.source_ids, rows.source_lengths)  # (P * B, S, D)
    states = model.decoder_states(rows.target_inputs, memory, rows.source_lengths)  # (P * B, T, D)
    valid = batch.target_outputs != model.config.pad_id  # (B, T)
    targets = batch.target_outputs[valid]  # (N,)
    states = states.view(passes, *valid.shape, -1)[:, valid]  # (P, N, D)
    distillation = teaching(batch, valid) if teaching else None
    loss = projected_cross_entropy(
        states, model.output_projection.weight, targets, config.label_smoothing, config.r_drop, distillation
    )
    if config.contrastive_weight:
        loss = loss + config.contrastive_weight * _of_translations(model, batch, config, memory[: len(valid)])
    return loss


def contrastive_loss(model: Transformer, batch: Batch, config: TrainingConfig) -> Tensor:
    """Of the vectors of sources and targets alone, for an encoder without a decoder."""
    return _of_translations(model, batch, config, model.encode(batch.source_ids, batch.source_lengths))


def classification_loss(model: Transformer, batch: Batch, config: TrainingConfig) -> Tensor:
    """Cross-entropy of the labels; a batch's targets are their numbers, one a row."""
    logits = model.classify(batch.source_ids, batch.source_lengths)  # (B, labels)
    return functional.cross_entropy(
        logits.float(), batch.target_outputs[:, 0], label_smoothing=config.label_smoothing, reduction="sum"
    )


_LOSSES: dict[str, Loss] = {
    "translation": translation_loss,
    "contrastive": contrastive_loss,
    "classification": classification_loss,
}


def _imported(path: str) -> Loss:
    """A loss of the user's own: `package.module:function`. Raises ConfigurationError."""
    module, _, name = path.partition(":")
    try:
        loss = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"loss: {path} cannot be imported ({error}). Give package.module:function, and see that the package is "
            "installed or PYTHONPATH names its directory."
        ) from error
    if not callable(loss):
        raise ConfigurationError(f"loss: {path} is no function")
    found: Loss = loss
    return found


def info_nce(ours: Tensor, theirs: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Which of the batch's vectors belongs to each one, by cosine, both ways: van den Oord et al. (2018), equation (4),
    with the others of the batch as negatives.

    ours and theirs (B, D); same (B, B), True where a pair is no negative since its texts are equal -> mean over B, ().
    """
    scores = functional.normalize(ours.float(), dim=1) @ functional.normalize(theirs.float(), dim=1).T / temperature
    places = torch.arange(len(scores), device=scores.device)
    others = same & (places[:, None] != places)
    scores = scores.masked_fill(others, -torch.inf)
    return (functional.cross_entropy(scores, places) + functional.cross_entropy(scores.T, places)) / 2


def _of_translations(model: Transformer, batch: Batch, config: TrainingConfig, memory: Tensor) -> Tensor:
    """InfoNCE of sources and targets, as if it were a loss of each target token."""
    target_ids = batch.target_outputs
    target_lengths = (target_ids != model.config.pad_id).sum(dim=1)
    theirs = model.encode(target_ids, target_lengths)
    loss = info_nce(
        mean_over_tokens(memory, batch.source_lengths),
        mean_over_tokens(theirs, target_lengths),
        _equal_rows(batch.source_ids) | _equal_rows(target_ids),
        config.contrastive_temperature,
    )
    return loss * batch.target_tokens


def _equal_rows(ids: Tensor) -> Tensor:
    """(B, L) -> (B, B), True where two rows are the same."""
    return (ids[:, None] == ids[None]).all(dim=-1)
