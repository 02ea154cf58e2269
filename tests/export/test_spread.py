"""What is said of activations before any input is seen holds once there are some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.profile import CPU
from export.spread import Embedded, Normalised, decoder_residuals, memory_of, read_by
from tests import tiny
from tests.export.test_graph_options import ODD, assert_scored_as_stepped, graphs_of


def test_a_layer_behind_a_norm_spreads_as_its_weights_say() -> None:
    """Mean and deviation of many inputs, whatever their own scale."""
    torch.manual_seed(3)
    norm, layer = nn.LayerNorm(64), nn.Linear(64, 20)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
        outputs = layer(norm(torch.randn(20_000, 64) * 7 + 3))
    spread = Normalised(norm).through(layer)
    torch.testing.assert_close(spread.mean, outputs.mean(dim=0), atol=0.05, rtol=0.05)
    torch.testing.assert_close(spread.deviation, outputs.std(dim=0), atol=0.02, rtol=0.05)
    assert (outputs.abs() <= spread.bound(6.0)).all()


def test_no_embedded_token_goes_beyond_its_bound() -> None:
    """From four deviations on, at any position."""
    model = tiny.tiny_checkpoint(**ODD).transformer()
    embedding, layer = model.target_embedding, model.decoder_stack[0].self_attention.key
    with torch.no_grad():
        tokens, positions = embedding.tokens.weight * embedding.scale, embedding.positions
        outputs = layer(tokens[:, None, :] + positions)  # type: ignore[operator]  # a module; every token at every position
    assert isinstance(layer, nn.Linear)
    assert (outputs.abs() <= Embedded(embedding).through(layer).bound(4.0) + 1e-5).all()


@pytest.mark.parametrize("pre_norm", [True, False])
def test_sublayers_read_what_stands_before_them(pre_norm: bool) -> None:
    """Their own norm in pre-norm, the one before in post-norm, whose first one reads embeddings."""
    model = tiny.tiny_checkpoint(pre_norm=pre_norm).transformer()
    residuals = decoder_residuals(model)
    reads = read_by(model.target_embedding, residuals)
    norms = [residual.norm for residual in residuals]
    expected = norms if pre_norm else [None, *norms[:-1]]
    assert [one.norm if isinstance(one, Normalised) else None for one in reads] == expected
    memory = memory_of(model)
    assert isinstance(memory, Normalised)
    last = model.encoder_stack[-1].feed_forward_residual.norm
    assert memory.norm is (model.encoder_norm if pre_norm else last)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_scorer_reads_rounded_keys_and_values_as_the_steps_do(
    tmp_path: Path, pre_norm: bool, activation: str
) -> None:
    """A whole target in one pass gives what its steps give: both round, and both by the same scales.

    They sum in different orders, so a number between two steps may go to the one here and to the other there: that is
    one pair of 40 at most. If the scorer did not round, these models would differ by 0.8 and more.
    """
    model = tiny.tiny_checkpoint(pre_norm=pre_norm, activation=activation).transformer()
    decoder = graphs_of(model, CPU["int8"], tmp_path)
    assert decoder.encode([[5, 2]]).state["cross_key_0"].dtype == np.int8
    assert_scored_as_stepped(model, decoder)
