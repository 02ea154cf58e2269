"""The transformer against its definition: numbers worked out by hand, masks, norms, degenerate rows."""

from __future__ import annotations

import math

import pytest
import torch

from model.attention import CrossAttention, Positions, attention
from model.config import TransformerConfig
from model.positions import sinusoidal_positions
from model.transformer import Dropout, Transformer, new_norm

X = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
ALL = torch.ones(1, 1, 1, 3, dtype=torch.bool)
# X X^T / sqrt(4): rows 1 and 2 have no place in common, so their score is 0, not 0.5.
SCORES = [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.5, 0.5, 1.0]]
# exp(1) = 2.71828, exp(0.5) = 1.64872, exp(0) = 1; rows sum to 5.36700, 5.36700, 6.01572
WEIGHTS = [[0.50648, 0.18632, 0.30720], [0.18632, 0.50648, 0.30720], [0.27407, 0.27407, 0.45186]]
OUTPUT = [
    [0.81368, 0.49352, 0.50648, 0.18632],
    [0.49352, 0.81368, 0.18632, 0.50648],
    [0.72593, 0.72593, 0.27407, 0.27407],
]


def tiny(**changes: object) -> TransformerConfig:
    fields = {
        "vocab_size": 50,
        "d_model": 16,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_source_tokens": 32,
    }
    return TransformerConfig(**{**fields, "max_target_tokens": 32, "dropout": 0.0, **changes})  # type: ignore[arg-type]


def tiny_model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny(**changes)).eval()


def test_attention_of_the_worked_example() -> None:
    """softmax(X X^T / 2) X has the values worked out by hand above, from scores that are 0 between rows 1 and 2."""
    torch.testing.assert_close(X @ X.T / 2, torch.tensor(SCORES))
    output, weights = attention(X, X, X)
    torch.testing.assert_close(weights, torch.tensor(WEIGHTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(output, torch.tensor(OUTPUT), atol=2e-5, rtol=0)


def test_multi_head_attention_of_the_worked_example() -> None:
    """With identity projections and one head of width 4 the module gives the same numbers."""
    module = CrossAttention(tiny(d_model=4, num_heads=1))
    for projection in (module.query, module.key, module.value, module.output):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    output = module(X[None], X[None], ALL)[0]
    torch.testing.assert_close(output, torch.tensor(OUTPUT), atol=2e-5, rtol=0)


def test_heads_are_separate_slices_of_the_width() -> None:
    """Two heads of width 2 attend each by their own half, and stand side by side in the output."""
    module = CrossAttention(tiny(d_model=4, num_heads=2))
    for projection in (module.query, module.key, module.value, module.output):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    halves = [attention(half, half, half)[0] for half in (X[:, :2], X[:, 2:])]
    torch.testing.assert_close(module(X[None], X[None], ALL)[0], torch.cat(halves, dim=-1))


def test_a_masked_place_counts_for_nothing() -> None:
    """What stands in a masked place changes no bit of the output."""
    mask = torch.tensor([[True, True, False]])
    other = X.clone()
    other[2] = 1e9
    assert torch.equal(attention(X, X, X, mask)[0], attention(X, other, other, mask)[0])
    torch.testing.assert_close(attention(X, X, X, mask)[0], attention(X, X[:2], X[:2])[0])


def test_a_query_without_anything_to_attend_to_gives_zero_and_finite_gradients() -> None:
    x = X.clone().requires_grad_()
    output, _ = attention(x, x, x, torch.zeros(3, 3, dtype=torch.bool))
    assert torch.equal(output, torch.zeros(3, 4))
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_fully_padded_row_gives_no_nan(pre_norm: bool) -> None:
    """A source of length 0 beside a real one: finite logits for both, and the real one is as it is alone."""
    model = tiny_model(pre_norm=pre_norm)
    ids = torch.randint(3, 50, (2, 5))
    targets = torch.randint(3, 50, (2, 4))
    logits = model(ids, torch.tensor([0, 5]), targets)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(ids[1:], torch.tensor([5]), targets[1:]))


def test_positions_are_sines_on_even_and_cosines_on_odd_dimensions() -> None:
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same."""
    positions = sinusoidal_positions(7, 6)
    for p in range(7):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert positions[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert positions[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_embedding_is_scaled_by_the_root_of_the_width() -> None:
    model = tiny_model()
    ids = torch.tensor([[7, 9]])
    expected = model.source_embedding.tokens.weight[ids] * 4.0 + sinusoidal_positions(2, 16)
    torch.testing.assert_close(model.source_embedding(ids), expected)


def test_padding_of_the_source_changes_nothing() -> None:
    """The same source with padding and noise behind its length gives the same memory and the same logits."""
    model = tiny_model()
    ids, targets = torch.randint(3, 50, (1, 5)), torch.randint(3, 50, (1, 6))
    padded = torch.cat([ids, torch.randint(3, 50, (1, 9))], dim=1)
    lengths = torch.tensor([5])
    torch.testing.assert_close(model.encode(padded, lengths)[:, :5], model.encode(ids, lengths))
    torch.testing.assert_close(model(padded, lengths, targets), model(ids, lengths, targets))


def test_the_decoder_does_not_see_the_future() -> None:
    """A changed token changes the logits from its own place on, and none before it."""
    model = tiny_model()
    ids, targets = torch.randint(3, 50, (1, 5)), torch.randint(3, 50, (1, 6))
    changed = targets.clone()
    changed[0, 3] = 3 + (changed[0, 3] - 2) % 47
    before, after = (model(ids, torch.tensor([5]), t)[0] for t in (targets, changed))
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(dim=-1).all()


def test_post_norm_ends_normalised_and_pre_norm_by_its_last_norm() -> None:
    """Either way the memory has mean 0 and variance 1 at every token, as fresh LayerNorms leave it."""
    for pre_norm in (False, True):
        memory = tiny_model(pre_norm=pre_norm).encode(torch.randint(3, 50, (2, 5)), torch.tensor([5, 5]))
        torch.testing.assert_close(memory.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
        torch.testing.assert_close(memory.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-3, rtol=0)


def test_post_norm_layer_is_the_formula() -> None:
    """LayerNorm(x + Sublayer(x)), for both sublayers of an encoder layer."""
    model = tiny_model()
    layer, x = model.encoder[0], torch.randn(1, 5, 16)
    positions = Positions(torch.tensor([5]))
    norm = torch.nn.functional.layer_norm
    x1 = norm(x + layer.self_attention(x, positions), (16,))
    expected = norm(x1 + layer.feed_forward(x1), (16,))
    torch.testing.assert_close(layer(x, positions), expected)


def test_feed_forward_is_four_times_as_wide_and_gelu() -> None:
    layer = tiny_model().encoder[0].feed_forward
    assert layer.inner.out_features == 64
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), layer.outer(torch.nn.functional.gelu(layer.inner(x))))


@pytest.mark.parametrize(("activation", "theirs"), [("geglu", "gelu"), ("swiglu", "silu")])
def test_a_gated_feed_forward_layer_is_the_formula(activation: str, theirs: str) -> None:
    """outer(activation(gate(x)) * inner(x)), worked out number by number; and a matrix more of parameters."""
    layer = tiny_model(activation=activation).encoder[0].feed_forward
    x = torch.randn(3, 16)
    gate = [
        [sum(w * v for w, v in zip(row, one, strict=True)) for row in layer.gate.weight.tolist()] for one in x.tolist()
    ]
    gate = torch.tensor(gate) + layer.gate.bias
    squashed = gate * torch.sigmoid(gate) if theirs == "silu" else gate * (1 + torch.erf(gate / 2**0.5)) / 2
    expected = (squashed * (x @ layer.inner.weight.T + layer.inner.bias)) @ layer.outer.weight.T + layer.outer.bias
    torch.testing.assert_close(layer(x), expected)
    plain = tiny_model().encoder[0].feed_forward
    assert _size(layer) - _size(plain) == 16 * 64 + 64


def test_rms_norm_is_the_formula() -> None:
    """x / sqrt(mean(x^2)) times the weight: of (3, 4, 0, 0) the mean square is 25 / 4."""
    norm = new_norm(TransformerConfig(d_model=4, num_heads=2, norm="rms_norm"))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        found = norm(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([1.2, 3.2, 0.0, 0.0]))
    assert sum("norm" in name for name, _ in tiny_model(norm="rms_norm", pre_norm=True).named_parameters()) == (
        sum(name.endswith("norm.weight") for name, _ in tiny_model(pre_norm=True).named_parameters())
    )


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_queries_keys_and_values_begin_as_torch_begins_them() -> None:
    torch.manual_seed(0)
    attention_of_ours = tiny_model(d_model=128).decoder_stack[0].cross_attention
    theirs = torch.nn.MultiheadAttention(128, 4).in_proj_weight  # queries, keys and values, (3 D, D)
    assert theirs is not None
    for projection in (attention_of_ours.query, attention_of_ours.key, attention_of_ours.value):
        assert projection.weight.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
        assert projection.weight.abs().max() <= math.sqrt(6 / (3 * 128 + 128)) + 1e-6
    whole = attention_of_ours.output.weight
    assert whole.var().item() == pytest.approx(2 * theirs.var().item(), rel=0.05)


def test_shared_embeddings_are_one_matrix() -> None:
    """Shared: one parameter for three uses. Not shared: three."""
    shared, separate = tiny_model(share_embeddings=True), tiny_model(share_embeddings=False)
    assert (
        shared.output_projection.weight
        is shared.source_embedding.tokens.weight
        is shared.target_embedding.tokens.weight
    )
    assert separate.num_parameters() - shared.num_parameters() == 2 * 50 * 16


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    """About a tenth of the places become zero, the rest grow by as much, and evaluation changes nothing."""
    module = Dropout(0.1)
    x = torch.ones(200, 500)
    dropped = module.train()(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_word_dropout_drops_whole_tokens_and_leaves_their_positions(positions: str) -> None:
    """A tenth of the tokens, the rest grow by as much; evaluation changes nothing."""
    embedding = tiny_model(word_dropout=0.1, positions=positions).source_embedding
    ids = torch.full((500, 20), 7)
    whole = embedding.eval()(ids)
    added = torch.zeros(20, 16) if embedding.positions is None else embedding.positions[:20]
    of_tokens = embedding.train()(ids) - added
    dropped = (of_tokens.abs() < 1e-6).all(dim=-1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(of_tokens[~dropped] * (230 / 256), (whole - added)[~dropped], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sharing", "different"), [("all", 0), ("sequence", 2), ("cycle", 2), ("cycle_reversed", 2)])
def test_shared_layers_compute_as_copies_would(sharing: str, different: int) -> None:
    """A model of four layers that shares them gives what one with copied weights gives, of fewer parameters."""
    fields = {"encoder_layers": 4, "decoder_layers": 4}
    shared = tiny_model(
        share_layers=sharing, different_encoder_layers=different, different_decoder_layers=different, **fields
    )
    plain = tiny_model(**fields)
    weights = shared.state_dict()
    for stack, order in (("encoder", shared.config.encoder_order), ("decoder", shared.config.decoder_order)):
        copies = {
            f"{stack}.{place}.{name}": tensor
            for place, number in enumerate(order)
            for name, tensor in shared.get_submodule(f"{stack}.{number}").state_dict().items()
        }
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{stack}.")} | copies
    plain.load_state_dict(weights)
    ids, targets, lengths = torch.randint(3, 50, (2, 5)), torch.randint(3, 50, (2, 6)), torch.tensor([5, 3])
    assert torch.equal(shared(ids, lengths, targets), plain(ids, lengths, targets))
    assert shared.num_parameters() < 0.6 * plain.num_parameters()
