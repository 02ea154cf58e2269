"""Positions against their formulas and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model.attention import CrossAttention, Positions, SelfAttention
from model.config import TransformerConfig
from model.positions import RelativeBias, Rotation, rotary_tables, rotate
from model.transformer import Transformer


def config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{"vocab_size": 50, "d_model": 16, "num_heads": 4, "dropout": 0.0, **changes})


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (32, 1000), (4, 3)])
def test_buckets_are_t5s(bidirectional: bool, buckets: int, max_distance: int) -> None:
    """For every distance up to 2,000 on either side."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, buckets, max_distance)
    assert torch.equal(RelativeBias(2, buckets, max_distance, bidirectional).buckets(distances), expected)


def test_biases_are_those_that_t5_adds() -> None:
    """transformers' compute_bias of an encoder's first layer, with our table."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    theirs = T5Attention(T5Config(d_model=16, num_heads=4, d_kv=4), has_relative_attention_bias=True, layer_idx=0)
    ours = RelativeBias(4, 32, 128, bidirectional=True)
    with torch.no_grad():
        theirs.relative_attention_bias.weight.copy_(ours.table.weight)
    places = torch.arange(9)
    torch.testing.assert_close(ours(places, places), theirs.compute_bias(9, 9)[0])


def test_a_stacks_layers_share_one_table_and_cross_attention_has_none() -> None:
    model = Transformer(config(positions="relative_bias"))
    names = [name for name, _ in model.named_parameters() if "bias.table" in name]
    assert names == ["source_positions.bias.table.weight", "target_positions.bias.table.weight"]
    assert model.source_embedding.positions is None


def test_rotation_by_hand() -> None:
    """Width 4 has the angles p and p / 100: features 0 and 2 turn by the first, 1 and 3 by the second."""
    turned = rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]), *(table[3] for table in rotary_tables(5, 4)))
    assert turned.tolist() == pytest.approx([math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)])


def test_rotation_is_that_of_published_models() -> None:
    """transformers' apply_rotary_pos_emb of Llama."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    x = torch.randn(2, 4, 9, 8)
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4))
    cosines, sines = embedding(x, torch.arange(9).expand(2, 9))
    expected, _ = apply_rotary_pos_emb(x, x, cosines, sines)
    torch.testing.assert_close(rotate(x, *rotary_tables(9, 8)), expected)


def test_rotated_attention_knows_distances_alone() -> None:
    """Moved along by five places, a sequence attends to itself as before."""
    module = SelfAttention(config(positions="rotary"), "full", causal=True)
    x = torch.randn(1, 6, 16)
    cosines, sines = rotary_tables(11, 4)
    here = module(x, Positions(None, rotation=(cosines[:6], sines[:6])))
    there = module(x, Positions(None, rotation=(cosines[5:], sines[5:])))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(here, module(x, Positions(None)), atol=1e-3)


def test_rotated_cross_attention_knows_how_far_the_source_is_from_the_target() -> None:
    """Moved along together, target and source give the same; moved apart, something else."""
    module = CrossAttention(config())
    x, memory, mask = torch.randn(1, 3, 16), torch.randn(1, 6, 16), torch.ones(1, 1, 1, 6, dtype=torch.bool)
    cosines, sines = rotary_tables(11, 4)

    def at(start: int, length: int) -> Rotation:
        return cosines[start : start + length], sines[start : start + length]

    here = module(x, memory, mask, (at(0, 3), at(0, 6)))
    torch.testing.assert_close(module(x, memory, mask, (at(5, 3), at(5, 6))), here, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(module(x, memory, mask, (at(0, 3), at(5, 6))), here, atol=1e-3)


def test_a_model_rotates_cross_attention_where_it_is_told_to() -> None:
    """Of the memory's order nothing but a rotation tells it."""
    torch.manual_seed(0)
    plain = Transformer(config(positions="rotary")).eval()
    rotated = Transformer(config(positions="rotary", rotary_cross_attention=True)).eval()
    rotated.load_state_dict(plain.state_dict())
    memory, lengths, start = torch.randn(1, 4, 16), torch.tensor([4]), torch.tensor([[1]])
    for model, knows in ((plain, False), (rotated, True)):
        forwards, backwards = (model.decode(start, order, lengths) for order in (memory, memory.flip(1)))
        assert torch.allclose(forwards, backwards, atol=1e-5) != knows


@pytest.mark.parametrize("positions", ["sinusoidal", "relative_bias", "rotary"])
def test_order_matters_under_each_kind(positions: str) -> None:
    """Words in another order give other logits; without positions the sum over the words would be the same."""
    torch.manual_seed(0)
    model = Transformer(config(positions=positions)).eval()
    ids, target = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]]), torch.tensor([[1, 9], [1, 9]])
    logits = model(ids, torch.tensor([4, 4]), target)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
