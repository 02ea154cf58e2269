"""The base size of Vaswani et al. (2017) with random weights: a model to measure, not one to read.

    python -m tests.benchmarks.base_model TEXT CHECKPOINT

TEXT (a line each, tab-separated or not, plain or gzipped) teaches the tokenizer its 32,000 tokens. Two dimensions of
the decoder carry the position alone, and the end token's row reads nothing but these, so every text ends after about
24 tokens in every engine, without a parameter that would slow one of them down.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from model.checkpoint import Checkpoint
from model.config import Recipe, TransformerConfig
from model.tokenizer import train_tokenizer
from model.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=32000,
    d_model=512,
    num_heads=8,
    d_ff=2048,
    encoder_layers=6,
    decoder_layers=6,
    activation="relu",
    pre_norm=True,
)
LENGTH = 24
"""Tokens of every text, the end token included, one more or less."""

_STEEPNESS = 4000.0
_LIVELINESS = 4.0
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
        _end_by_position(model)
    metadata = {
        "name": "base",
        "source_language": "en",
        "target_language": "de",
        "license": "none",
        "training_data": "random weights",
        "description": "the base size with random weights, for measurements",
    }
    return Checkpoint(Recipe(model=CONFIG), tokenizer, model.state_dict(), metadata)


def _end_by_position(model: Transformer) -> None:
    """Keep one sine and its cosine free of all else, and let the end token be said when their angle is reached."""
    frequency = math.pi / 4 / (LENGTH - 1.5)  # the angle is 45 degrees between the last two places
    pair = round(-math.log(frequency) * CONFIG.d_model / 2 / math.log(10000.0))
    angle = (LENGTH - 1.5) * 10000.0 ** (-2 * pair / CONFIG.d_model)
    sine, cosine = 2 * pair, 2 * pair + 1
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.output.weight", "feed_forward.outer.weight")):
            parameter[[sine, cosine]] = 0.0
    words = model.target_embedding.tokens.weight
    words[:, [sine, cosine]] = 0.0
    words[CONFIG.eos_id] = 0.0
    words[CONFIG.eos_id, sine] = _STEEPNESS * math.cos(angle)
    words[CONFIG.eos_id, cosine] = -_STEEPNESS * math.sin(angle)


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
