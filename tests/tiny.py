"""A tiny model with a real tokenizer and random weights: exported in seconds, and its rows differ."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from model.checkpoint import Checkpoint
from model.config import TransformerConfig
from model.recipe import Recipe, TrainingConfig
from model.tokenizer import train_tokenizer
from model.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=300,
    d_model=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    pre_norm=True,
    max_source_tokens=64,
    max_target_tokens=48,
)

_WORDS = (
    "the a my your this train station house cat dog green little old goes sees takes is was not where when here "
    "to in on with tomorrow today slowly never and but water bread street city friend book"
)


def sentences(count: int, seed: int = 1) -> list[str]:
    """Different made-up sentences of two to twelve words."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        words = rng.choices(_WORDS.split(), k=rng.randint(2, 12))
        found[" ".join(words).capitalize() + rng.choice(".?!")] = None
    return list(found)


def tiny_checkpoint(seed: int = 1, **changes: object) -> Checkpoint:
    """A checkpoint whose greedy translations differ from source to source and end at varying lengths."""
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]  # the caller names fields of TransformerConfig
    tokenizer = train_tokenizer(sentences(200), config.vocab_size)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "attention" in name and parameter.dim() == 2:
                parameter.mul_(3.0 if "output" in name else 3.0 * 2**0.5)  # the others begin smaller
        if config.labels:  # of which each is the likeliest somewhere
            model.classifier.weight.mul_(3.0)  # type: ignore[union-attr]  # there is one
            model.classifier.bias.zero_()  # type: ignore[union-attr]
        # A long vector has logits that vary more than the others': the end comes soon or late.
        model.output_projection.weight[config.eos_id] *= 3.0
    torch.random.set_rng_state(generator_state)
    metadata = {
        "name": "tiny",
        "source_language": "en",
        "target_language": "de",
        "license": "none",
        "training_data": "random weights",
        "description": "random weights for tests",
    }
    training = TrainingConfig(loss="classification" if config.labels else "translation")
    return Checkpoint(Recipe(config, training), tokenizer, model.state_dict(), metadata)


def write_sentences(path: Path, count: int = 500) -> Path:
    """A TSV file of so many sentences, each its own translation."""
    path.write_text("".join(f"{text}\t{text}\n" for text in sentences(count, seed=2)), encoding="utf-8")
    return path
