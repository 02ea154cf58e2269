"""Checkpoints: what a run has learnt, in one file that also holds the recipe and the tokenizer.

A file is read with torch's weights-only loader, so that opening one runs no code from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.recipe import Recipe
from model.tokenizer import tokenizer_from_json
from model.transformer import Transformer

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one of another format."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with what it needs to be used, continued or exported."""

    recipe: Recipe
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    """Plain values: name, languages, licence, training data, scores, step."""
    training_state: dict[str, Any] | None = None
    """Optimizer, place in the data, random states: only where a run can be continued from here."""

    def transformer(self) -> Transformer:
        """The model with these weights, in evaluation mode."""
        model = Transformer(self.recipe.model)
        model.load_state_dict(self.weights)
        return model.eval()

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(
            {
                "format": FORMAT,
                "recipe": self.recipe.to_dict(),
                "tokenizer": self.tokenizer.to_str(),
                "weights": self.weights,
                "metadata": self.metadata,
                "training_state": self.training_state,
            },
            partial,
        )
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file onto the CPU. Raises CheckpointError with the file's name."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such checkpoint; `transduce train` writes one") from error
        except Exception as error:  # torch raises a different class for every way in which a file can be broken
            raise CheckpointError(f"{path}: not a checkpoint of transduce train ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}; train it again with this version")
        return cls(
            recipe=Recipe.from_dict(content["recipe"]),
            tokenizer=tokenizer_from_json(content["tokenizer"]),
            weights=content["weights"],
            metadata=content["metadata"],
            training_state=content["training_state"],
        )


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU. Names that share a tensor share its copy, so that a file holds it once."""
    return _each_once(weights, lambda name: weights[name].detach().cpu().clone())


def average_weights(checkpoints: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over several sets of weights (Vaswani et al., 2017, section 6.1), summed in float64."""
    first = checkpoints[0]

    def mean(name: str) -> Tensor:
        return torch.stack([weights[name].double() for weights in checkpoints]).mean(0).to(first[name].dtype)

    return _each_once(first, mean)


def _each_once(weights: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """make(name) of every name, called once for names that share a tensor."""
    made: dict[int, Tensor] = {}
    result = {}
    for name, tensor in weights.items():
        place = tensor.data_ptr()
        if place not in made:
            made[place] = make(name)
        result[name] = made[place]
    return result
