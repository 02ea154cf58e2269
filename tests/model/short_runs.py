"""Models and batches small enough to be reckoned by hand, and runs of seconds that learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import TransformerConfig
from model.data import Batch, pad_rows
from model.transformer import Transformer
from service.cli import main
from tests import tiny


def model(**changes: Any) -> Transformer:
    """One layer each of width 16, the same weights every time."""
    torch.manual_seed(0)
    fields = {"vocab_size": 50, "d_model": 16, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    return Transformer(TransformerConfig(**{**fields, **changes}))


def batch(sources: Sequence[list[int]], targets: Sequence[list[int]]) -> Batch:
    """Of these token ids, ends included; the corpus has no other pairs."""
    return Batch(
        source_ids=pad_rows(list(sources), 0),
        source_lengths=torch.tensor([len(source) for source in sources]),
        target_inputs=pad_rows([[1, *target[:-1]] for target in targets], 0),
        target_outputs=pad_rows(list(targets), 0),
        target_tokens=sum(map(len, targets)),
        pairs=list(range(len(sources))),
    )


PAIRS = batch([[5, 6, 2], [7, 2], [8, 9, 10, 2]], [[15, 2], [16, 17, 18, 2], [19, 20, 2]])


RECIPE = """
[model]
vocab_size = 290
d_model = 32
num_heads = 2
encoder_layers = 1
decoder_layers = {decoder_layers}
dropout = 0.0
pre_norm = true
max_source_tokens = 32
max_target_tokens = 32
[training]
batch_tokens = 400
learning_rate = 0.004
warmup_steps = 20
max_steps = {steps}
validate_every = {steps}
precision = "fp32"
{more}
[metadata]
name = "tiny"
"""


def train(path: Path, run: str, lines: list[str], *options: str, decoder_layers: int = 0, **values: Any) -> Path:
    """A run on these lines; gives its model.pt."""
    more = "\n".join(f"{name} = {value!r}" for name, value in values.items() if name != "steps")
    recipe = RECIPE.format(decoder_layers=decoder_layers, steps=values.get("steps", 60), more=more)
    (path / f"{run}.toml").write_text(recipe)
    (path / f"{run}.tsv").write_text("".join(f"{line}\n" for line in lines))
    arguments = ["--recipe", f"{path / run}.toml", "--data", f"{path / run}.tsv", "--output", str(path / run)]
    assert main(["train", *arguments, "--holdout", "0.1", "--threads", "1", *options]) == 0
    return path / run / "model.pt"


def translations() -> list[str]:
    """Lines of 400 sentences, and each of them backwards in capitals."""
    return [f"{text}\t{text.upper()[::-1]}" for text in tiny.sentences(400)]
