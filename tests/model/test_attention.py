"""The cheaper attentions against the dense one, their formulas by hand, and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import (
    Positions,
    SelfAttention,
    attention,
    causal_linear_attention,
    linear_attention,
    positive_features,
    random_directions,
    softmax_features,
    valid_tokens,
    window_attention,
)
from model.config import TransformerConfig
from model.positions import RelativeBias
from model.transformer import Transformer


def heads(length: int, seed: int = 0, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value (rows, 2, length, 8)."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, rows, 2, length, 8, generator=generator)
    return query, key, value


def config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{"vocab_size": 50, "d_model": 16, "num_heads": 4, "dropout": 0.0, **changes})


def longformer_mask(lengths: Tensor, size: int, window: int, global_tokens: int) -> Tensor:
    """(B, 1, L, L), written from the paper's figure 2 (d)."""
    place = torch.arange(size)
    near = (place[:, None] - place).abs() <= window // 2
    first = (place[:, None] < global_tokens) | (place < global_tokens)
    return (near | first) & valid_tokens(lengths, size)[:, None, None]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("window", "global_tokens"), [(2, 0), (2, 1), (8, 0), (8, 3), (24, 12), (48, 1)])
def test_windows_in_blocks_are_dense_attention_under_the_windows_mask(
    window: int, global_tokens: int, biased: bool
) -> None:
    """Rows shorter than the padded length, than a block, and of one token alone."""
    query, key, value = heads(24, rows=3)
    lengths = torch.tensor([24, 7, 1])
    bias = RelativeBias(2, 8, 6, bidirectional=True) if biased else None
    found = window_attention(query, key, value, lengths, window, global_tokens, bias)
    places = torch.arange(24)
    dense = None if bias is None else bias(places, places)
    expected, _ = attention(query, key, value, longformer_mask(lengths, 24, window, global_tokens), dense)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :, :length], expected[row, :, :length])
    assert found.isfinite().all()


def test_a_window_as_long_as_the_source_is_full_attention() -> None:
    """In the model as a whole, encoder and decoder, with the same weights."""
    full = Transformer(config(max_source_tokens=32, max_target_tokens=32)).eval()
    windowed = Transformer(
        config(
            max_source_tokens=32,
            max_target_tokens=32,
            encoder_attention="window",
            encoder_window=64,
            decoder_attention="window",
            decoder_window=32,
        )
    ).eval()
    windowed.load_state_dict(full.state_dict())
    source, target, lengths = torch.randint(3, 50, (2, 30)), torch.randint(3, 50, (2, 32)), torch.tensor([30, 11])
    torch.testing.assert_close(windowed(source, lengths, target), full(source, lengths, target))


def test_a_decoders_window_hides_what_is_farther_back() -> None:
    """Position t sees itself and the two before it, in a window of 3."""
    module = SelfAttention(config(decoder_attention="window", decoder_window=3), "window", causal=True)
    x = torch.randn(1, 8, 16)
    changed = x.clone()
    changed[0, 2] += 1
    differs = (module(x, Positions(None)) != module(changed, Positions(None))).any(dim=-1)[0]
    assert differs.tolist() == [False, False, True, True, True, False, False, False]


def test_longformer_attends_as_its_published_implementation() -> None:
    """transformers' LongformerSelfAttention, given the same projections for both kinds of positions."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    published = LongformerConfig(
        hidden_size=16, num_attention_heads=4, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(published, layer_id=0).eval()
    ours = SelfAttention(config(encoder_attention="window", encoder_window=8, global_tokens=2), "window", causal=False)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            layer = getattr(ours, name)
            torch.nn.init.normal_(layer.weight, std=0.4)
            for there in (getattr(theirs, name), getattr(theirs, f"{name}_global")):
                there.weight.copy_(layer.weight)
                there.bias.copy_(layer.bias)
        torch.nn.init.eye_(ours.output.weight)
        torch.nn.init.zeros_(ours.output.bias)
    x = torch.randn(2, 24, 16)
    lengths = torch.tensor([24, 13])
    places = torch.arange(24).expand(2, 24)
    masked, is_global = places >= lengths[:, None], places < 2
    with torch.no_grad():
        (expected, *_) = theirs(
            x,
            attention_mask=is_global * 10000.0 - masked * 10000.0,  # as the model around it calls it
            is_index_masked=masked,
            is_index_global_attn=is_global,
            is_global_attn=True,
        )
        found = ours(x, Positions(lengths))
    torch.testing.assert_close(found[~masked], expected[~masked], atol=1e-5, rtol=1e-5)


def test_linear_attention_by_hand() -> None:
    """One feature a head, elu(0) + 1 = 1 and elu(1) + 1 = 2, elu(-1) + 1 = 1 / e: means with these weights."""
    assert positive_features(torch.tensor([0.0, 1.0, -1.0])).tolist() == pytest.approx([1, 2, math.exp(-1)])
    query, key = torch.tensor([[1.0], [1.0], [5.0]]), torch.tensor([[1.0], [2.0], [1 / math.e]])
    value = torch.tensor([[10.0], [40.0], [0.0]])
    both = [part[None, None] for part in (query, key, value)]
    everywhere = linear_attention(*both, torch.ones(1, 1, 3, 1, dtype=torch.bool))[0, 0, :, 0]
    assert everywhere.tolist() == pytest.approx([90 / (3 + math.exp(-1))] * 3)
    causal = causal_linear_attention(*both)[0, 0, :, 0]
    assert causal.tolist() == pytest.approx([10, 30, 90 / (3 + math.exp(-1))])


def test_what_linear_attention_sums_is_the_sum_over_pairs() -> None:
    """The quadratic form of the same, over the valid keys."""
    query, key, value = heads(9)
    query, key = positive_features(query), positive_features(key)
    valid = valid_tokens(torch.tensor([9, 4]), 9)[:, None, :, None]
    pairs = (query @ key.transpose(-2, -1)) * valid.transpose(-2, -1)
    torch.testing.assert_close(
        linear_attention(query, key, value, valid), pairs @ value / pairs.sum(dim=-1, keepdim=True)
    )


def test_performer_features_come_near_the_softmax_the_more_there_are() -> None:
    """Mean error over 20 draws: below 0.04 with 4096 features, and falling by more than a half from 64 to 1024."""
    query, key, value = (part * 0.7 for part in heads(12))
    lengths = torch.tensor([12, 5])
    valid = valid_tokens(lengths, 12)[:, None, :, None]
    expected, _ = attention(query, key, value, valid.transpose(-2, -1))
    torch.manual_seed(3)
    errors = {}
    for features in (64, 1024, 4096):
        found = []
        for _ in range(20):
            directions = random_directions(features, 8)
            heads_ = linear_attention(
                softmax_features(query, directions, None), softmax_features(key, directions, valid), value, valid
            )
            found.append(float((heads_ - expected).abs().mean()))
        errors[features] = sum(found) / len(found)
    assert errors[4096] < 0.04
    assert errors[1024] < errors[64] / 2


def test_what_is_behind_a_sources_end_does_not_touch_performers_features() -> None:
    """Not even by the largest exponent, of which only the valid keys' counts."""
    module = SelfAttention(config(encoder_attention="performer"), "performer", causal=False)
    x = torch.randn(1, 6, 16)
    noisy = torch.cat([x, 100 * torch.randn(1, 5, 16)], dim=1)
    lengths = Positions(torch.tensor([6]))
    torch.testing.assert_close(module(noisy, lengths)[:, :6], module(x, lengths), atol=1e-6, rtol=1e-5)


def test_one_group_per_head_is_multi_head_attention_and_fewer_share_keys() -> None:
    """num_kv_heads = num_heads is the default; with 2 of 4, heads 0 and 1 read the first keys, 2 and 3 the second:
    the same as multi-head attention whose keys and values are repeated.
    """
    assert config(num_kv_heads=4).kv_heads == config().kv_heads == 4
    grouped = SelfAttention(config(num_kv_heads=2), "full", causal=True)
    plain = SelfAttention(config(), "full", causal=True)
    with torch.no_grad():
        for name in ("query", "output"):
            getattr(plain, name).load_state_dict(getattr(grouped, name).state_dict())
        for name in ("key", "value"):
            narrow, wide = getattr(grouped, name), getattr(plain, name)
            rows = torch.arange(8).view(2, 4).repeat_interleave(2, dim=0).flatten()
            wide.weight.copy_(narrow.weight[rows])
            wide.bias.copy_(narrow.bias[rows])
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(grouped(x, Positions(None)), plain(x, Positions(None)))


def test_grouped_heads_attend_as_pytorchs_own_operator() -> None:
    """scaled_dot_product_attention with enable_gqa, on the module's own projections."""
    module = SelfAttention(config(num_kv_heads=1), "full", causal=True)
    x = torch.randn(2, 7, 16)
    query, key, value = module.heads(x, x)
    heads_ = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(module(x, Positions(None)), module.merge(heads_))


@pytest.mark.parametrize("kind", ["full", "window", "linear", "performer"])
def test_padding_of_the_source_changes_nothing(kind: str) -> None:
    model = Transformer(config(encoder_attention=kind, encoder_window=4)).eval()
    ids, lengths = torch.randint(3, 50, (1, 5)), torch.tensor([5])
    padded = torch.cat([ids, torch.randint(3, 50, (1, 9))], dim=1)
    torch.testing.assert_close(model.encode(padded, lengths)[:, :5], model.encode(ids, lengths))


@pytest.mark.parametrize("kind", ["full", "window", "linear"])
def test_the_decoder_does_not_see_the_future(kind: str) -> None:
    model = Transformer(config(decoder_attention=kind, decoder_window=4)).eval()
    ids, targets = torch.randint(3, 50, (1, 5)), torch.randint(3, 50, (1, 6))
    changed = targets.clone()
    changed[0, 3] = 3 + (changed[0, 3] - 2) % 47
    before, after = (model(ids, torch.tensor([5]), t)[0] for t in (targets, changed))
    torch.testing.assert_close(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(dim=-1).all()


@pytest.mark.parametrize("kind", ["full", "window", "linear", "performer"])
def test_every_kind_has_finite_gradients_with_a_row_of_one_token(kind: str) -> None:
    model = Transformer(config(encoder_attention=kind, encoder_window=4))
    loss = model(torch.randint(3, 50, (2, 6)), torch.tensor([6, 1]), torch.randint(3, 50, (2, 4))).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
