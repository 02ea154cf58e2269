"""The base size of Vaswani et al. (2017) with random weights: a model to measure, not one to read.

    python -m tests.benchmarks.base_model TEXT CHECKPOINT

TEXT (a line each, tab-separated or not, plain or gzipped) teaches the tokenizer its 32,000 tokens. The end token's row
is zero, which is never the best of so many: every text goes on to the limit of 24 tokens, in every engine.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

import torch

from model.checkpoint import Checkpoint
from model.config import TransformerConfig
from model.recipe import Recipe
from model.tokenizer import train_tokenizer
from model.transformer import Transformer

LENGTH = 24
"""Tokens of every text."""

CONFIG = TransformerConfig(
    vocab_size=32000,
    d_model=512,
    num_heads=8,
    d_ff=2048,
    encoder_layers=6,
    decoder_layers=6,
    activation="relu",
    pre_norm=True,
    max_target_tokens=LENGTH,
)
_LIVELINESS = 2.0
"""As the weights are drawn, a text would repeat its first token, whose embedding outweighs what the layers add."""


def base_checkpoint(text: Path, seed: int = 1) -> Checkpoint:
    """The checkpoint; its tokenizer learns from the file's lines."""
    tokenizer = train_tokenizer(_lines(text), CONFIG.vocab_size)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    torch.random.set_rng_state(random_state)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.outer.weight")):
                parameter *= _LIVELINESS
        model.output_projection.weight[CONFIG.eos_id] = 0.0
    metadata = {
        "name": "base",
        "source_language": "en",
        "target_language": "de",
        "license": "none",
        "training_data": "random weights",
        "description": "the base size with random weights, for measurements",
    }
    return Checkpoint(Recipe(model=CONFIG), tokenizer, model.state_dict(), metadata)


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield from line.rstrip("\n").split("\t")


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    base_checkpoint(arguments.text).save(arguments.checkpoint)


if __name__ == "__main__":
    main()
