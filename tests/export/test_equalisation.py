"""Factors that are moved from one layer to the next change no answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from export.equalisation import equalise
from export.integer_state import HEADS_DEVIATIONS
from export.spread import Normalised, memory_of
from model.attention import MultiHeadAttention
from model.transformer import DecoderLayer, EncoderLayer, Transformer
from tests import tiny


def uneven_model(pre_norm: bool, **options: str) -> Transformer:
    """With norms whose weights and biases differ from feature to feature, as training makes them."""
    model = tiny.tiny_checkpoint(pre_norm=pre_norm, **options).transformer()
    torch.manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.weight.uniform_(0.1, 3.0)
            if isinstance(module, nn.LayerNorm):
                module.bias.normal_(std=0.5)
    return model


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm": "rms_norm", "activation": "swiglu"}])
def test_an_equalised_model_gives_the_same_logits(pre_norm: bool, options: dict[str, str]) -> None:
    """And the same memory, which is an answer of its own; in float64, which rounds what moves away from nothing."""
    model = uneven_model(pre_norm, **options).double()
    changed = equalise(copy.deepcopy(model))
    source, lengths, target = torch.randint(3, 300, (4, 9)), torch.tensor([9, 1, 5, 8]), torch.randint(3, 300, (4, 7))
    with torch.no_grad():
        expected, logits = model(source, lengths, target), changed(source, lengths, target)
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        memory = model.encode(source, lengths), changed.encode(source, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(memory[1][row, :length], memory[0][row, :length], atol=1e-9, rtol=1e-9)


def test_all_values_have_the_same_bound() -> None:
    """Those of every attention, so that one scale does for what it gives."""
    model = uneven_model(pre_norm=True)
    layer = model.decoder[0]
    assert isinstance(layer, DecoderLayer)
    assert _unevenness(layer.cross_attention, memory_of(model)) > 1.5
    equalise(model)
    for layer in (*model.encoder, *model.decoder):
        assert isinstance(layer, EncoderLayer | DecoderLayer)
        assert _unevenness(layer.self_attention, Normalised(layer.self_attention_residual.norm)) < 1.001
        if isinstance(layer, DecoderLayer):
            assert _unevenness(layer.cross_attention, memory_of(model)) < 1.001


def test_norms_before_a_sublayer_are_left_with_nothing_of_their_own() -> None:
    """In pre-norm; the last ones of both stacks are read by others too, and keep what they have."""
    model = uneven_model(pre_norm=True)
    last = copy.deepcopy(model.encoder_norm), copy.deepcopy(model.decoder_norm)
    equalise(model)
    norms = [
        module
        for stack in (model.encoder, model.decoder)
        for module in stack.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    assert len(norms) == 2 + 2 * 3
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    for before, norm in zip(last, (model.encoder_norm, model.decoder_norm), strict=True):
        torch.testing.assert_close(norm.state_dict(), before.state_dict())


def test_a_feature_of_no_size_stays_a_number() -> None:
    """Values that are always zero are as good as any."""
    model = uneven_model(pre_norm=True).double()
    attention = model.encoder_stack[0].self_attention
    assert isinstance(attention, MultiHeadAttention)
    with torch.no_grad():
        attention.value.weight[:3] = 0
        attention.value.bias[:3] = 0
        source, lengths = torch.randint(3, 300, (2, 5)), torch.tensor([5, 5])
        expected = model.encode(source, lengths)
        torch.testing.assert_close(equalise(model).encode(source, lengths), expected, atol=1e-9, rtol=1e-9)


def _unevenness(attention: MultiHeadAttention, context: Normalised) -> float:
    """The largest bound of a value's feature over the smallest."""
    bound = context.through(attention.value).bound(HEADS_DEVIATIONS)
    return float(bound.max() / bound.min())
