"""An artifact made on the spot, of a checkpoint or of random weights of the base size. Needs what an export needs.

For measurements alone: no parity check, and no variant of the CPU's own, so that it takes seconds. The self-test is
what ONNX Runtime's CPU provider makes of the same graphs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from export.artifact_decoder import ArtifactDecoder
from export.graphs import write_decoder, write_encoder, write_reorder
from export.manifest import FORMAT_VERSION, checksums, write_manifest
from export.profile import CUDA, Precision
from export.state import state_tensors
from model.checkpoint import Checkpoint
from model.config import TransformerConfig
from model.recipe import Recipe
from model.tokenizer import train_tokenizer
from model.transformer import Transformer
from tests.benchmarks.gpu.request import Request

BASE = TransformerConfig(
    vocab_size=32000, d_model=512, num_heads=8, d_ff=2048, encoder_layers=6, decoder_layers=6, activation="relu",
    pre_norm=True,
)  # fmt: skip
_TESTS, _TEST_TOKENS = 6, 16


@dataclass(frozen=True)
class Exported:
    """The part `export`."""

    artifact: str
    problems: list[str] = field(default_factory=list)


def look(request: Request) -> Exported:
    """The part `export`: an artifact in the request's directory."""
    assert request.directory is not None
    checkpoint = Checkpoint.load(request.checkpoint) if request.checkpoint else random_checkpoint(BASE)
    name = str(checkpoint.metadata["name"])
    return Exported(str(_write(checkpoint, request.precision, request.directory / f"{name}-{request.precision}")))


def random_checkpoint(config: TransformerConfig) -> Checkpoint:
    """Weights with which texts differ from source to source; they hardly ever end."""
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif "attention" in name and parameter.dim() == 2:
                parameter.mul_(2.0)
    tokenizer = train_tokenizer(["made up"], 300)  # nothing is tokenised
    return Checkpoint(Recipe(model=config), tokenizer, model.state_dict(), {"name": "random-base"})


def _write(checkpoint: Checkpoint, precision: Precision, directory: Path) -> Path:
    config, model, profile = checkpoint.recipe.model, checkpoint.transformer(), CUDA[precision]
    graphs = {name: f"cuda/{name}.onnx" for name in ("encoder", "decoder", "reorder")}
    write_encoder(model, profile, directory / graphs["encoder"])
    write_decoder(model, profile, directory / graphs["decoder"])
    write_reorder(config, profile, directory / graphs["reorder"])
    (directory / "tokenizer.json").write_text(checkpoint.tokenizer.to_str(), encoding="utf-8")
    entry = {"precision": precision, **graphs}
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": directory.name,
        "version": "1",
        "description": "for measurements",
        "architecture": {name: getattr(config, name) for name in ("d_model", "decoder_layers", "d_ff", "vocab_size")},
        "embedding_size": config.d_model,
        "vocab_size": config.vocab_size,
        "max_source_tokens": config.max_source_tokens,
        "max_target_tokens": config.max_target_tokens,
        "special_tokens": {"pad_id": config.pad_id, "bos_id": config.bos_id, "eos_id": config.eos_id},
        "state": state_tensors(config),
        "variants": {"cpu": entry, "cuda": entry},
    }
    write_manifest(directory, manifest)
    manifest["self_test"] = _self_test(ArtifactDecoder(directory, "cuda"), config)
    manifest["files"] = checksums(directory)
    write_manifest(directory, manifest)
    return directory


def _self_test(decoder: ArtifactDecoder, config: TransformerConfig) -> list[dict[str, Any]]:
    rng = random.Random(4)
    sources = [
        [*(rng.randrange(3, config.vocab_size) for _ in range(rng.randint(1, 30))), config.eos_id]
        for _ in range(_TESTS)
    ]
    answers = decoder.greedy(sources, max_new_tokens=_TEST_TOKENS, batch_rows=1)
    return [
        {"source": "", "source_ids": source, "target_ids": {"cpu": answer.ids, "cuda": answer.ids}}
        for source, answer in zip(sources, answers, strict=True)
    ]
