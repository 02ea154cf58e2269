"""Muon against its formula, by singular values, and against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from model.optimizer import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (1, 8, 24)])
def test_singular_vectors_stay_and_values_follow_the_polynomial(shape: tuple[int, int, int]) -> None:
    """What five steps do to a matrix, Jordan's polynomial does to each singular value alone."""
    matrices = np.random.default_rng(0).normal(size=shape)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    assert np.median(values) > 0.6
    assert values.max() < 1.3
    np.testing.assert_allclose(
        orthogonalised(torch.from_numpy(matrices)).numpy(), left * values[:, None] @ right, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch(dtype: torch.dtype) -> None:
    """Momentum, decay and rate as in torch.optim.Muon, whose products are rounded to bf16."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(8, 24))]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    begin = [matrix.detach().clone() for matrix in ours]
    for optimizer in (
        Muon(ours, 0.02, 0.1, dtype),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        torch.manual_seed(1)
        for _ in range(3):
            for matrix in optimizer.param_groups[0]["params"]:
                matrix.grad = torch.randn_like(matrix)
            optimizer.step()
    for start, own, other in zip(begin, ours, theirs, strict=True):
        assert torch.linalg.norm(own - other) < 0.02 * torch.linalg.norm(other - start)
