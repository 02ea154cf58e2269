"""The loss in blocks against torch's cross-entropy of all logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, linear

from model.cross_entropy import Distillation, SaidInFull, SaidOfMost, projected_cross_entropy


def states_weight_targets(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    states, weight = torch.randn(1, rows, 12, dtype=dtype), torch.randn(40, 12, dtype=dtype)
    return states.requires_grad_(), weight.requires_grad_(), torch.randint(0, 40, (rows,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 128, 700])
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows: int, smoothing: float) -> None:
    """For one row, a full block and several with a rest."""
    states, weight, targets = states_weight_targets(rows, torch.float32)
    expected = cross_entropy(linear(states[0], weight), targets, label_smoothing=smoothing, reduction="sum")
    gradients = torch.autograd.grad(expected / 7, (states, weight))
    loss = projected_cross_entropy(states, weight, targets, smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss / 7, (states, weight)), gradients, rtol=1e-4, atol=1e-5)


def test_no_row_is_no_loss() -> None:
    """A batch of nothing but padding, should one come up."""
    states, weight, targets = states_weight_targets(0, torch.float32)
    loss = projected_cross_entropy(states, weight, targets, 0.1)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    assert float(loss.detach()) == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_under_autocast_products_are_bf16_and_sums_are_not() -> None:
    """Gradients as close as bf16 allows; the loss of 700 rows is not rounded to bf16's two digits."""
    states, weight, targets = states_weight_targets(700, torch.float32)
    expected = cross_entropy(linear(states[0], weight), targets, label_smoothing=0.1, reduction="sum")
    gradients = torch.autograd.grad(expected, (states, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = projected_cross_entropy(states, weight, targets, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0.0)
    assert float(loss.detach()) != float(loss.detach().bfloat16())
    for found, wanted in zip(torch.autograd.grad(loss, (states, weight)), gradients, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("rows", [3, 64, 300])
def test_r_drop_is_the_mean_of_two_passes_and_their_divergence_both_ways(rows: int) -> None:
    """Loss and gradients by autograd from the formula: mean cross-entropy and alpha / 2 times the mean of both KL."""
    torch.manual_seed(0)
    states, weight = torch.randn(2, rows, 12, requires_grad=True), torch.randn(40, 12, requires_grad=True)
    targets = torch.randint(0, 40, (rows,))
    logits = linear(states, weight)
    first, second = logits.log_softmax(-1)
    both = [kl_div(a, b, reduction="sum", log_target=True) for a, b in ((first, second), (second, first))]
    entropies = [cross_entropy(one, targets, label_smoothing=0.1, reduction="sum") for one in logits]
    expected = sum(entropies) / 2 + 5.0 / 2 * sum(both) / 2
    gradients = torch.autograd.grad(expected, (states, weight))
    loss = projected_cross_entropy(states, weight, targets, 0.1, r_drop=5.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, weight)), gradients, rtol=1e-4, atol=1e-4)


def said(logits: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher that says this of one row: state 1, and logits for a projection."""
    return torch.ones(1, 1), torch.tensor(logits)[:, None]


def distilled(ours: list[float], told: list[list[float]]) -> float:
    states, weight = said(ours)
    distillation = Distillation(SaidInFull([said(each) for each in told], 1.0), weight=1.0)
    return float(projected_cross_entropy(states[None], weight, torch.tensor([0]), 0.0, distillation=distillation))


def test_distillation_by_hand() -> None:
    """An even student, a teacher with 3/4 and 1/4: 3/4 ln(3/2) + 1/4 ln(1/2)."""
    loss = distilled([0.0, 0.0], [[math.log(3.0), 0.0]])
    assert loss == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_several_teachers_tell_the_mean_of_their_probabilities() -> None:
    """One says 3/4, 1/4 and one 1/4, 3/4: an even student has nothing to learn, another has half of each to."""
    told = [[math.log(3.0), 0.0], [0.0, math.log(3.0)]]
    assert distilled([0.0, 0.0], told) == pytest.approx(0.0, abs=1e-6)
    assert distilled([math.log(3.0), 0.0], told) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    )


@pytest.mark.parametrize(("passes", "r_drop"), [(1, 0.0), (2, 3.0)])
def test_distillation_takes_its_share_of_loss_and_gradients(passes: int, r_drop: float) -> None:
    """By autograd from Hinton's formula, mean of the passes, over several blocks and two teachers of other widths."""
    torch.manual_seed(0)
    states, weight = torch.randn(passes, 300, 12, requires_grad=True), torch.randn(40, 12, requires_grad=True)
    targets = torch.randint(0, 40, (300,))
    told = [(torch.randn(300, width), torch.randn(40, width)) for width in (6, 20)]
    theirs = torch.stack([linear(*each).div(4).softmax(-1) for each in told]).mean(0)
    ours = linear(states, weight).div(4).log_softmax(-1)
    divergence = 16 * kl_div(ours, theirs.expand_as(ours), reduction="sum") / passes
    expected = 0.3 * projected_cross_entropy(states, weight, targets, 0.1, r_drop) + 0.7 * divergence
    gradients = torch.autograd.grad(expected, (states, weight))
    loss = projected_cross_entropy(states, weight, targets, 0.1, r_drop, Distillation(SaidInFull(told, 4.0), 0.7))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, weight)), gradients, rtol=1e-4, atol=1e-4)


def test_what_the_likeliest_tokens_leave_over_is_even_among_the_others() -> None:
    """One token of four has 0.7, so the others have 0.1 each: 0.7 ln(2.8) + 0.3 ln(0.4) for an even student."""
    said = SaidOfMost(torch.tensor([[2]]), torch.tensor([[0.7]]), 4, 1.0)
    loss = projected_cross_entropy(
        torch.ones(1, 1, 1), torch.zeros(4, 1), torch.tensor([0]), 0.0, distillation=Distillation(said, 1.0)
    )
    assert float(loss) == pytest.approx(0.7 * math.log(2.8) + 0.3 * math.log(0.4))


@pytest.mark.parametrize(("passes", "r_drop", "temperature"), [(1, 0.0, 1.0), (1, 0.0, 2.0), (2, 3.0, 1.0)])
def test_distillation_from_the_likeliest_tokens_is_that_from_their_distribution(
    passes: int, r_drop: float, temperature: float
) -> None:
    """By autograd from Hinton's formula; rounding may leave over less than nothing."""
    torch.manual_seed(0)
    states, weight = torch.randn(passes, 300, 12, requires_grad=True), torch.randn(40, 12, requires_grad=True)
    targets = torch.randint(0, 40, (300,))
    most, tokens = torch.randn(300, 40).mul(4).softmax(-1).topk(5)
    most[0] *= 1.000001 / most[0].sum()
    theirs = ((1 - most.sum(-1, keepdim=True)).clamp_min(0) / 35).repeat(1, 40).scatter(1, tokens, most)
    ours = linear(states, weight).div(temperature).log_softmax(-1)
    divergence = temperature**2 * kl_div(ours, theirs.expand_as(ours), reduction="sum") / passes
    expected = 0.3 * projected_cross_entropy(states, weight, targets, 0.1, r_drop) + 0.7 * divergence
    gradients = torch.autograd.grad(expected, (states, weight))
    distillation = Distillation(SaidOfMost(tokens, most, 40, temperature), 0.7)
    loss = projected_cross_entropy(states, weight, targets, 0.1, r_drop, distillation)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, weight)), gradients, rtol=1e-4, atol=1e-4)
