"""Recipes: read, checked, and refused with the field's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import ConfigurationError, TransformerConfig
from model.recipe import Recipe, read_recipe


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"d_model": 30, "num_heads": 4}, "d_model"),
        ({"d_model": 9, "num_heads": 3}, "d_model"),
        ({"dropout": 1.0}, "dropout"),
        ({"word_dropout": -0.1}, "word_dropout"),
        ({"vocab_size": 2}, "special ids"),
        ({"pad_id": 1}, "pad_id"),
        ({"encoder_layers": 0}, "encoder_layers"),
        ({"activation": "swish"}, "activation"),
        ({"norm": "batch_norm"}, "norm"),
        ({"max_source_tokens": 1}, "max_source_tokens"),
        ({"positions": "learnt"}, "positions"),
        ({"positions": "rotary", "d_model": 12, "num_heads": 4}, "positions.*odd width"),
        ({"positions": "rotary", "encoder_attention": "linear"}, "positions"),
        ({"positions": "relative_bias", "decoder_attention": "linear"}, "positions"),
        ({"rotary_cross_attention": True}, "rotary_cross_attention"),
        ({"relative_buckets": 6}, "relative_buckets"),
        ({"relative_max_distance": 16}, "relative_max_distance"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"encoder_attention": "sparse"}, "encoder_attention"),
        ({"encoder_attention": "window", "encoder_window": 0}, "encoder_window"),
        ({"encoder_attention": "window", "encoder_window": 7}, "encoder_window"),
        ({"encoder_attention": "window", "encoder_window": 8, "global_tokens": 5}, "global_tokens"),
        ({"decoder_attention": "performer"}, "decoder_attention"),
        ({"decoder_attention": "window", "decoder_window": 0}, "decoder_window"),
        ({"performer_features": -1}, "performer_features"),
        ({"share_layers": "some"}, "share_layers"),
        ({"share_layers": "all", "different_encoder_layers": 2}, "different_encoder_layers"),
        ({"share_layers": "cycle", "different_encoder_layers": 3}, "different_decoder_layers"),
        ({"share_layers": "cycle", "different_encoder_layers": 7}, "different_encoder_layers"),
        ({"share_layers": "sequence", "different_encoder_layers": 4}, "different_encoder_layers"),
    ],
)
def test_a_transformer_that_cannot_work_is_refused_by_the_fields_name(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        TransformerConfig(**fields)  # type: ignore[arg-type]  # a parameter of the test


@pytest.mark.parametrize(
    ("sharing", "different", "layers", "order"),
    [
        ("none", 0, 3, [0, 1, 2]),
        ("all", 0, 3, [0, 0, 0]),
        ("sequence", 3, 6, [0, 0, 1, 1, 2, 2]),
        ("cycle", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("cycle", 2, 5, [0, 1, 0, 1, 0]),
        ("cycle_reversed", 3, 6, [0, 1, 2, 2, 1, 0]),
        ("cycle_reversed", 3, 9, [0, 1, 2, 0, 1, 2, 2, 1, 0]),
        ("cycle_reversed", 3, 3, [0, 1, 2]),
    ],
)
def test_shared_layers_stand_in_the_papers_orders(sharing: str, different: int, layers: int, order: list[int]) -> None:
    """Figure 1 of Takase and Kiyono, its numbers counted from 0."""
    config = TransformerConfig(
        share_layers=sharing,  # type: ignore[arg-type]  # a parameter of the test
        encoder_layers=layers,
        decoder_layers=layers,
        different_encoder_layers=different,
        different_decoder_layers=different,
    )
    assert config.encoder_order == config.decoder_order == order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidth = 3\n", "model.width"),
        ("[model]\nd_model = '256'\n", "model.d_model must be of type int"),
        ("[model]\nencoder_window = [4, 8]\n", "model.encoder_window must be of type int"),
        ("[training]\nlearning_rate = true\n", "training.learning_rate"),
        ("[training]\noptimizer = 'sgd'\n", "optimizer must be 'adam' or 'muon'"),
        ("[training]\nspaces = 'none'\n", "spaces must be 'before' or 'after'"),
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
