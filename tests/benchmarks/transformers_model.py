"""A checkpoint as a Hugging Face model: the same weights in an independent implementation of network and decoding.

Marian has LayerNorm after each sum, M2M100 before each sublayer and one at the end; both scale their embeddings and add
fixed positions, whose table is replaced by ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

from model.checkpoint import Checkpoint
from model.data import pad_rows
from model.transformer import Transformer

_PARTS = {
    "self_attention.query": "self_attn.q_proj",
    "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj",
    "self_attention.output": "self_attn.out_proj",
    "self_attention_residual.norm": "self_attn_layer_norm",
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "cross_attention_residual.norm": "encoder_attn_layer_norm",
    "feed_forward.inner": "fc1",
    "feed_forward.outer": "fc2",
    "feed_forward_residual.norm": "final_layer_norm",
}


def transformers_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with the checkpoint's weights, in evaluation mode. Shared embeddings only."""
    config = checkpoint.recipe.model
    if not config.share_embeddings:
        raise ValueError("only shared embeddings are converted")
    kind, settings = (
        (M2M100ForConditionalGeneration, M2M100Config) if config.pre_norm else (MarianMTModel, MarianConfig)
    )
    model = kind(
        settings(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.feed_forward_width,
            decoder_ffn_dim=config.feed_forward_width,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            activation_function=config.activation,
            max_position_embeddings=max(config.max_source_tokens, config.max_target_tokens + 1),
            scale_embedding=True,
            pad_token_id=config.pad_id,
            bos_token_id=config.bos_id,
            eos_token_id=config.eos_id,
            decoder_start_token_id=config.bos_id,
            forced_eos_token_id=None,
        )
    )
    ours = checkpoint.transformer()
    weights = {_name(name): tensor for name, tensor in ours.state_dict().items()}
    left_over = model.load_state_dict(weights, strict=False)
    # What is not loaded is tied to what is, is the table of positions, or is Marian's bias of logits: zero.
    allowed = ("embed_tokens", "embed_positions", "final_logits_bias")
    unknown = [name for name in left_over.missing_keys if not any(part in name for part in allowed)]
    if unknown or left_over.unexpected_keys:
        raise ValueError(f"weights without a place: {unknown}, {left_over.unexpected_keys}")
    model.tie_weights()
    _set_positions(model, ours)
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_id,
        bos_token_id=config.bos_id,
        eos_token_id=config.eos_id,
        decoder_start_token_id=config.bos_id,
        # Padding and start are never generated, as in Transduce.
        bad_words_ids=[[config.pad_id], [config.bos_id]],
        max_new_tokens=config.max_target_tokens,
    )
    return model.eval()


def _name(ours: str) -> str:
    """Their name of one of our tensors."""
    part, _, kind = ours.rpartition(".")
    if part in ("source_embedding.tokens", "target_embedding.tokens"):
        return "model.shared.weight"
    if part == "output_projection":
        return "lm_head.weight"
    if part in ("encoder_norm", "decoder_norm"):
        return f"model.{part.removesuffix('_norm')}.layer_norm.{kind}"
    side, layer, within = part.split(".", 2)
    return f"model.{side}.layers.{layer}.{_PARTS[within]}.{kind}"


def _set_positions(model: PreTrainedModel, ours: Transformer) -> None:
    """Our table in place of theirs, which has all sines before all cosines."""
    sides = (
        (model.model.encoder.embed_positions, ours.source_embedding.positions),
        (model.model.decoder.embed_positions, ours.target_embedding.positions),
    )
    for theirs, table in sides:
        if isinstance(model, MarianMTModel):
            theirs.weight = torch.nn.Parameter(table.clone(), requires_grad=False)
        else:  # positions begin behind the padding's id, whose own row is not attended to
            theirs.weights = torch.cat([torch.zeros(theirs.padding_idx + 1, table.size(1)), table, table[-1:]])


@dataclass(frozen=True)
class Generated:
    """One result: ids without the start token and the prefix, and what `generate` calls its score (None for greedy)."""

    ids: list[int]
    score: float | None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    sources: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]] | None = None,
    batch_rows: int = 64,
    **parameters: Any,
) -> list[list[Generated]]:
    """The n best of each source (its ids end with the end token), by `generate` with these parameters.

    Sources with prefixes of one length share a batch, since `generate` pads prefixes on the wrong side.
    """
    order = sorted(range(len(sources)), key=lambda i: (len(prefixes[i]) if prefixes else 0, len(sources[i])))
    results: dict[int, list[Generated]] = {}
    while order:
        length = len(prefixes[order[0]]) if prefixes else 0
        batch = [i for i in order[:batch_rows] if not prefixes or len(prefixes[i]) == length]
        order = order[len(batch) :]
        results.update(zip(batch, _batch(model, sources, batch, prefixes, parameters), strict=True))
    return [results[i] for i in range(len(sources))]


def _batch(
    model: PreTrainedModel,
    sources: Sequence[Sequence[int]],
    batch: list[int],
    prefixes: Sequence[Sequence[int]] | None,
    parameters: dict[str, Any],
) -> list[list[Generated]]:
    config = model.generation_config
    source_ids = pad_rows([list(sources[i]) for i in batch], config.pad_token_id)
    lengths = torch.tensor([len(sources[i]) for i in batch])
    starts = torch.tensor([[config.bos_token_id, *(prefixes[i] if prefixes else ())] for i in batch])
    output = model.generate(
        input_ids=source_ids,
        attention_mask=(torch.arange(source_ids.size(1)) < lengths[:, None]).long(),
        decoder_input_ids=starts,
        output_scores=True,
        return_dict_in_generate=True,
        **parameters,
    )
    rows = output.sequences[:, starts.size(1) :].tolist()
    scores: Tensor | None = getattr(output, "sequences_scores", None)
    if scores is None:
        found = [Generated(_until_end(row, config.eos_token_id, config.pad_token_id), None) for row in rows]
    else:
        # What follows a hypothesis that was cut is filled with end tokens, so the beams have to say how long it is.
        lengths = (output.beam_indices >= 0).sum(dim=1).tolist()
        every = zip(rows, lengths, scores.tolist(), strict=True)
        found = [Generated(row[:length], score) for row, length, score in every]
    each = len(found) // len(batch)
    return [found[start : start + each] for start in range(0, len(found), each)]


def _until_end(row: list[int], eos_id: int, pad_id: int) -> list[int]:
    """The row up to its end token, or up to the padding behind a row that was cut."""
    if eos_id in row:
        return row[: row.index(eos_id) + 1]
    return row[: row.index(pad_id)] if pad_id in row else row
