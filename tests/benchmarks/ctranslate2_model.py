"""A checkpoint as a CTranslate2 model: the same weights in the engine that Transduce is measured against.

    python -m tests.benchmarks.ctranslate2_model CHECKPOINT DIRECTORY [--quantization int8]

Knows the layout of CTranslate2's Transformer specification; what the two engines do alike, and where they differ, is
said where they are compared (tests/service/test_against_ctranslate2.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.converters import utils
from ctranslate2.specs import common_spec, transformer_spec
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.checkpoint import Checkpoint

Weights = Mapping[str, NDArray[np.float32]]

_ACTIVATIONS = {"gelu": common_spec.Activation.GELU, "relu": common_spec.Activation.RELU}


class Vocabulary:
    """Token ids as the strings that CTranslate2 wants, and back. Ids that the tokenizer does not know get a name."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        names = (tokenizer.id_to_token(i) for i in range(vocab_size))
        self.tokens: list[str] = [f"<unused-{i}>" if name is None else name for i, name in enumerate(names)]
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def names(self, ids: Sequence[int]) -> list[str]:
        """Strings of these ids."""
        return [self.tokens[i] for i in ids]

    def ids(self, names: Sequence[str]) -> list[int]:
        """Ids of these strings."""
        return [self._ids[name] for name in names]


def write_ctranslate2_model(checkpoint: Checkpoint, directory: Path, quantization: str | None = None) -> Path:
    """Write the model's directory, in float32 or with weights quantised ("int8"), and return it.

    Sources are given to CTranslate2 without the end token, which it appends; the decoder starts from the start token.
    The padding token plays the unknown one, so that `disable_unk` keeps it from being generated, as Transduce does.
    """
    config = checkpoint.recipe.model
    spec = transformer_spec.TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.num_heads,
        pre_norm=config.pre_norm,
        activation=_ACTIVATIONS[config.activation],
        alignment_heads=config.num_heads,  # the mean of all, of the last layer
    )
    model = checkpoint.transformer()
    weights: Weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    positions = {"encoder": model.source_embedding.positions, "decoder": model.target_embedding.positions}
    sides = (("encoder", spec.encoder, "source_embedding"), ("decoder", spec.decoder, "target_embedding"))
    for side, part, embedding in sides:
        embeddings = part.embeddings[0] if side == "encoder" else part.embeddings
        embeddings.weight = weights[f"{embedding}.tokens.weight"]
        part.position_encodings.encodings = positions[side].numpy()
        if config.pre_norm:
            _norm(part.layer_norm, weights, f"{side}_norm")
        for n, layer in enumerate(part.layer):
            _layer(layer, weights, f"{side}.{n}")
    spec.decoder.projection.weight = weights["output_projection.weight"]
    vocabulary = Vocabulary(checkpoint.tokenizer, config.vocab_size)
    spec.register_source_vocabulary(vocabulary.tokens)
    spec.register_target_vocabulary(vocabulary.tokens)
    spec.config.unk_token = vocabulary.tokens[config.pad_id]
    spec.config.bos_token = spec.config.decoder_start_token = vocabulary.tokens[config.bos_id]
    spec.config.eos_token = vocabulary.tokens[config.eos_id]
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize(quantization=quantization)
    directory.mkdir(parents=True, exist_ok=True)
    spec.save(str(directory))
    return directory


def _layer(spec: object, weights: Weights, name: str) -> None:
    """One layer of the encoder, or of the decoder, which has one more attention."""
    _attention(spec.self_attention, weights, f"{name}.self_attention", fused=("query", "key", "value"))
    if hasattr(spec, "attention"):
        _linear(spec.attention.linear[0], weights, f"{name}.cross_attention.query")
        _attention(spec.attention, weights, f"{name}.cross_attention", fused=("key", "value"))
    _norm(spec.ffn.layer_norm, weights, f"{name}.feed_forward_residual.norm")
    _linear(spec.ffn.linear_0, weights, f"{name}.feed_forward.inner")
    _linear(spec.ffn.linear_1, weights, f"{name}.feed_forward.outer")


def _attention(spec: object, weights: Weights, name: str, fused: Sequence[str]) -> None:
    """The projections that are fused stand before the last one, which is the output's."""
    parts = [common_spec.LinearSpec() for _ in fused]
    for part, which in zip(parts, fused, strict=True):
        _linear(part, weights, f"{name}.{which}")
    utils.fuse_linear(spec.linear[-2], parts)
    _linear(spec.linear[-1], weights, f"{name}.output")
    _norm(spec.layer_norm, weights, f"{name}_residual.norm")


def _linear(spec: common_spec.LinearSpec, weights: Weights, name: str) -> None:
    spec.weight, spec.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]


def _norm(spec: common_spec.LayerNormSpec, weights: Weights, name: str) -> None:
    spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quantization", choices=ctranslate2.specs.model_spec.ACCEPTED_MODEL_TYPES)
    arguments = parser.parse_args()
    write_ctranslate2_model(Checkpoint.load(arguments.checkpoint), arguments.directory, arguments.quantization)


if __name__ == "__main__":
    main()
