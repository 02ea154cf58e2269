"""Every architecture that can be trained can be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import export.artifact_decoder
from export.artifact_decoder import ArtifactDecoder, open_session
from export.comparison import differences, invariance
from export.graph_file import Port, save, trace
from export.graphs import write_decoder, write_encoder, write_scorer
from export.layers import NORM_DEVIATIONS, Bounded, fused_linear
from export.profile import CPU, CUDA, Precision, Profile
from export.spread import Normalised
from export.state import state_tensors
from model.transformer import Transformer
from tests import tiny

ODD = {
    "pre_norm": False,
    "activation": "relu",
    "share_embeddings": False,
    "d_model": 36,
    "num_heads": 3,
    "d_ff": 40,
}


def graphs_of(model: Transformer, profile: Profile, path: Path) -> ArtifactDecoder:
    """A decoder over freshly exported graphs, without the rest of an artifact."""
    config = model.config
    write_encoder(model, profile, path / "encoder.onnx")
    write_decoder(model, profile, path / "decoder.onnx")
    write_scorer(model, profile, 0, path / "decoder.onnx", path / "scorer.onnx")
    manifest = {
        "variants": {"cpu": {name: f"{name}.onnx" for name in ("encoder", "decoder", "scorer")}},
        "alignment_layer": 0,
        "special_tokens": {"pad_id": 0, "bos_id": 1, "eos_id": 2},
        "vocab_size": config.vocab_size,
        "max_source_tokens": config.max_source_tokens,
        "max_target_tokens": config.max_target_tokens,
        "state": state_tensors(config),
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return ArtifactDecoder(path, threads=1)


def graph_weights(path: Path) -> int:
    """Bytes of a graph's constants."""
    return sum(tensor.ByteSize() for tensor in onnx.load(path).graph.initializer)


def some_pairs(config_vocab: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(5)
    return (
        [[*rng.integers(3, config_vocab, rng.integers(0, 20)).tolist(), 2] for _ in range(40)],
        [[*rng.integers(3, config_vocab, rng.integers(0, 9)).tolist(), 2] for _ in range(40)],
    )


def assert_scored_as_stepped(model: Transformer, decoder: ArtifactDecoder) -> None:
    """Of 40 pairs all but one within 1e-4, and that one within 0.1."""
    pairs = zip(*some_pairs(300), strict=True)
    found = sorted(differences(model, decoder, [source], [target]).scores_to_steps for source, target in pairs)
    assert found[-2] < 1e-4
    assert found[-1] < 0.1


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_post_norm_relu_and_separate_embeddings_of_odd_sizes_export(tmp_path: Path, provider: str) -> None:
    """In fp32, for the CPU and for CUDA's operators, the graphs give PyTorch's logits, its scores, and its attention in
    the first decoder layer of two, for sources of one token too.
    """
    model = tiny.tiny_checkpoint(**ODD).transformer()
    decoder = graphs_of(model, (CPU if provider == "cpu" else CUDA)["fp32"], tmp_path)
    sources, targets = some_pairs(300)
    assert min(map(len, sources)) == 1
    found = differences(model, decoder, sources, targets)
    assert found.logits < 1e-3
    assert max(found.scores, found.scores_to_steps, found.alignments) < 1e-4


def test_int8_of_odd_sizes_keeps_every_row_to_itself(tmp_path: Path) -> None:
    """Widths that fill no vector register, several batches: still the same bits, at any padding."""
    model = tiny.tiny_checkpoint(**{**ODD, "d_model": 40, "num_heads": 5}).transformer()
    assert invariance(graphs_of(model, CPU["int8"], tmp_path), *some_pairs(300)) == (True, True)


def run_linear(path: Path, layer: nn.Module, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """What ONNX Runtime makes of a layer and an input (rows, 24)."""
    port, y = Port("x", ("rows", 24)), Port("y", ("rows", 10))
    save(trace(layer, [(port, x)], [y]), path / "linear.onnx")
    (found,) = open_session(path / "linear.onnx", threads=1).run(None, {"x": x.numpy()})
    return np.asarray(found)


def test_a_row_of_zeros_quantises_to_zeros(tmp_path: Path) -> None:
    """Where a row has a scale of its own: the result is the bias, not NaN. Other rows are near the product."""
    torch.manual_seed(1)
    layer = nn.Linear(24, 10)
    x = torch.cat([torch.zeros(1, 24), torch.randn(4, 24), torch.full((1, 24), 1e-30)])
    y = run_linear(tmp_path, fused_linear([layer], integer=True), x)
    with torch.no_grad():
        expected = layer(x).numpy()
    assert y[0].tolist() == layer.bias.tolist()
    np.testing.assert_allclose(y, expected, atol=0.05)


class NormAndLinear(nn.Module):
    """A linear layer that reads a norm, in integers."""

    def __init__(self, norm: nn.LayerNorm, layer: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, fused_linear([layer], integer=True)
        self.bound = float(Normalised(norm).spread.bound(NORM_DEVIATIONS).max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(Bounded.up_to(self.norm(x), self.bound))
        return y


def test_what_a_norm_gives_is_quantised_by_a_constant_and_cut_off_beyond_it(tmp_path: Path) -> None:
    """The product is near that of floats, with the bias, for rows that lie within the bound; an outlier counts as much
    as the bound."""
    torch.manual_seed(2)
    norm, layer = nn.LayerNorm(24), nn.Linear(24, 10)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.3)
    x = torch.randn(20, 24) * torch.logspace(-2, 4, 20)[:, None]
    with torch.no_grad():
        expected = layer(norm(x)).numpy()
    np.testing.assert_allclose(run_linear(tmp_path, NormAndLinear(norm, layer), x), expected, atol=0.12)
    plain = nn.LayerNorm(24)
    bounded = NormAndLinear(plain, layer)
    bounded.bound = 2.0
    with torch.no_grad():
        cut = layer(plain(x).clamp(-2, 2)).numpy()
    np.testing.assert_allclose(run_linear(tmp_path, bounded, x), cut, atol=0.12)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("heads", [3, 8])
def test_rows_keep_their_bits_with_any_number_of_heads(tmp_path: Path, precision: Precision, heads: int) -> None:
    """Alignments too, which are means over the heads."""
    model = tiny.tiny_checkpoint(d_model=8 * heads, num_heads=heads).transformer()
    assert invariance(graphs_of(model, CPU[precision], tmp_path), *some_pairs(300))[0]


BLOCKS = [("layer_norm", "swiglu", True), ("rms_norm", "geglu", True), ("rms_norm", "relu", False)]


@pytest.mark.parametrize(("norm", "activation", "pre_norm"), BLOCKS)
@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_other_norms_and_gates_give_what_the_model_gives(
    tmp_path: Path, norm: str, activation: str, pre_norm: bool, profile: str
) -> None:
    """In fp32, for the CPU and with the operators for CUDA; rows keep their bits."""
    model = tiny.tiny_checkpoint(norm=norm, activation=activation, pre_norm=pre_norm).transformer()
    decoder = graphs_of(model, (CPU if profile == "cpu" else CUDA)["fp32"], tmp_path)
    found = differences(model, decoder, *some_pairs(300))
    assert 0 < found.logits < 1e-3
    assert max(found.scores, found.scores_to_steps, found.alignments) < 1e-4
    assert invariance(decoder, *some_pairs(300))[0]


@pytest.mark.parametrize(("norm", "activation", "pre_norm"), BLOCKS)
def test_other_norms_and_gates_work_in_integers(tmp_path: Path, norm: str, activation: str, pre_norm: bool) -> None:
    """Rows keep their bits, and the scorer rounds as the steps do."""
    model = tiny.tiny_checkpoint(norm=norm, activation=activation, pre_norm=pre_norm).transformer()
    decoder = graphs_of(model, CPU["int8"], tmp_path)
    assert invariance(decoder, *some_pairs(300)) == (True, True)
    assert_scored_as_stepped(model, decoder)


VARIATIONS: dict[str, dict[str, Any]] = {
    "multi_query": {"num_heads": 4, "num_kv_heads": 1, "d_model": 32},
    "grouped_of_odd_width": {"num_heads": 4, "num_kv_heads": 2, "d_model": 24},
    "relative_bias": {"positions": "relative_bias", "relative_buckets": 8, "relative_max_distance": 6},
    "relative_bias_of_odd_width": {
        "positions": "relative_bias", "relative_buckets": 8, "relative_max_distance": 6, "d_model": 24,
    },
    "rotary": {"positions": "rotary"},
    "rotary_of_odd_width": {"positions": "rotary", "d_model": 24, "num_heads": 2, "num_kv_heads": 1},
    "rotary_of_few_features": {"positions": "rotary", "d_model": 16},
    "rotary_everywhere": {"positions": "rotary", "rotary_cross_attention": True, "decoder_layers": 2},
    "rotary_everywhere_of_few_heads": {
        "positions": "rotary", "rotary_cross_attention": True, "d_model": 32, "num_heads": 4, "num_kv_heads": 2,
    },
    "rotary_everywhere_and_shared": {
        "positions": "rotary", "rotary_cross_attention": True, "share_layers": "all", "encoder_layers": 2,
        "decoder_layers": 2,
    },
    "window": {
        "encoder_attention": "window", "encoder_window": 8, "global_tokens": 2,
        "decoder_attention": "window", "decoder_window": 4,
    },
    "window_wider_than_the_example": {"encoder_attention": "window", "encoder_window": 16},
    "window_without_global_tokens": {
        "encoder_attention": "window", "encoder_window": 4, "global_tokens": 0, "num_kv_heads": 1,
        "decoder_attention": "window", "decoder_window": 5, "positions": "rotary",
    },
    "window_with_bias": {
        "encoder_attention": "window", "encoder_window": 8, "d_model": 24,
        "decoder_attention": "window", "decoder_window": 4,
        "positions": "relative_bias", "relative_buckets": 8, "relative_max_distance": 6,
    },
    "linear": {"encoder_attention": "linear", "decoder_attention": "linear", "num_heads": 4, "num_kv_heads": 2},
    "performer": {"encoder_attention": "performer", "performer_features": 24},
    "shared": {"share_layers": "all", "encoder_layers": 2, "pre_norm": False},
    "shared_in_cycle": {
        "share_layers": "cycle", "different_encoder_layers": 2, "different_decoder_layers": 2,
        "encoder_layers": 3, "decoder_layers": 3,
    },
}  # fmt: skip


TOGETHER = (
    "grouped_of_odd_width",
    "relative_bias",
    "rotary_of_few_features",
    "rotary_everywhere",
    "window_with_bias",
    "window_wider_than_the_example",
    "linear",
    "shared",
)
"""Each variation in one of these at least; the others, CUDA's operators and integers run with the slow tests."""


@pytest.mark.parametrize(
    ("changes", "profile"),
    [
        pytest.param(
            changes,
            profile,
            id=f"{name}-{profile}",
            marks=() if name in TOGETHER and profile == "cpu" else pytest.mark.slow,
        )
        for name, changes in VARIATIONS.items()
        for profile in ("cpu", "cuda")
    ],
)
def test_variations_give_what_the_model_gives(tmp_path: Path, changes: dict[str, Any], profile: str) -> None:
    """In fp32, for the CPU and with the operators for CUDA: logits, scores and alignments of targets longer than a
    window; rows keep their bits in any batch and at any padding.
    """
    model = tiny.tiny_checkpoint(**changes).transformer()
    decoder = graphs_of(model, (CPU if profile == "cpu" else CUDA)["fp32"], tmp_path)
    found = differences(model, decoder, *some_pairs(300))
    assert 0 < found.logits < 1e-3
    assert max(found.scores, found.scores_to_steps, found.alignments) < 1e-4
    assert invariance(decoder, *some_pairs(300)) == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
def test_variations_work_in_integers(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Rows keep their bits, and the scorer rounds as the steps do."""
    model = tiny.tiny_checkpoint(**changes).transformer()
    decoder = graphs_of(model, CPU["int8"], tmp_path)
    assert invariance(decoder, *some_pairs(300)) == (True, True)
    assert_scored_as_stepped(model, decoder)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_shared_layer_is_stored_once(tmp_path: Path, precision: str) -> None:
    """The graphs of four layers that share their weights are as large as those of one layer, but for the nodes."""
    sizes = {}
    for name, changes in {
        "one": {"encoder_layers": 1, "decoder_layers": 1},
        "shared": {"encoder_layers": 4, "decoder_layers": 4, "share_layers": "all"},
        "plain": {"encoder_layers": 4, "decoder_layers": 4},
    }.items():
        model = tiny.tiny_checkpoint(d_model=64, **changes).transformer()
        encoder, decoder = (tmp_path / f"{name}-{graph}.onnx" for graph in ("encoder", "decoder"))
        write_encoder(model, CPU[precision], encoder)
        write_decoder(model, CPU[precision], decoder)
        sizes[name] = graph_weights(encoder) + graph_weights(decoder)
    assert sizes["shared"] < 1.05 * sizes["one"]
    assert sizes["plain"] > 2 * sizes["one"]


def test_a_shared_layer_of_integers_is_exact_without_vnni_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime makes of a matrix for such a processor, it makes for each place where the matrix is read."""
    monkeypatch.setattr(export.artifact_decoder, "products_saturate", lambda: True)
    model = tiny.tiny_checkpoint(encoder_layers=2, decoder_layers=2, share_layers="all").transformer()
    decoder = graphs_of(model, CPU["int8"], tmp_path)
    assert differences(model, decoder, *some_pairs(300)).logits < 5  # 3.4; 8.8 with sums that saturate
