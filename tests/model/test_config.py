"""Recipes: read, checked, and refused with the field's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.cli import read_recipe
from model.config import ConfigurationError, Recipe, TransformerConfig


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"d_model": 30, "num_heads": 4}, "d_model"),
        ({"d_model": 9, "num_heads": 3}, "d_model"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": 2}, "special ids"),
        ({"pad_id": 1}, "pad_id"),
        ({"encoder_layers": 0}, "encoder_layers"),
        ({"activation": "swish"}, "activation"),
        ({"norm": "batch_norm"}, "norm"),
        ({"max_source_tokens": 1}, "max_source_tokens"),
    ],
)
def test_a_transformer_that_cannot_work_is_refused_by_the_fields_name(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        TransformerConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidth = 3\n", "model.width"),
        ("[model]\nd_model = '256'\n", "model.d_model must be of type int"),
        ("[training]\nlearning_rate = true\n", "training.learning_rate"),
        ("[training]\noptimizer = 'sgd'\n", "optimizer must be 'adam' or 'muon'"),
        ("[other]\n", "other"),
        ("[model\n", "recipe.toml"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as refusal:
        read_recipe(path, [])
    assert "recipe.toml" in str(refusal.value)


def test_a_recipe_survives_its_checkpoint(tmp_path: Path) -> None:
    """to_dict and from_dict are each other's inverse, whole numbers standing for fractions included."""
    path = tmp_path / "recipe.toml"
    path.write_text("[model]\nd_model = 64\n[training]\nlearning_rate = 1\n")
    recipe, _ = read_recipe(path, [])
    assert recipe.model.d_model == 64
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_shipped_recipe_is_valid() -> None:
    """The recipes in model/recipes can be read, and name the artifact they make."""
    paths = sorted(Path("model/recipes").glob("*.toml"))
    assert paths
    for path in paths:
        recipe, metadata = read_recipe(path, [])
        assert recipe.training.max_steps > 0
        assert metadata["name"]
