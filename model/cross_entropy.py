"""Losses of a projection to the vocabulary that never hold all of its logits: cross-entropy, the difference of two
passes, and that from what teachers say.

Logits and their gradient are the largest tensors of a small model's training by far, and writing and reading them took
most of a step. Here a block of rows goes from states to gradients while it is in the processor's cache.

Letters in the shape comments: P passes, N rows, n rows of a block, D = d_model, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


def block_rows(device: torch.device) -> int:
    """Rows of all passes at a time: with 6,000 tokens 3 MB of float32. Two passes of 256 rows took three times as
    long. A GPU wants few calls: there memory alone bounds a block, with 8,000 tokens 260 MB for each tensor of logits.
    """
    return 128 if device.type == "cpu" else 8192


class Said(Protocol):
    """Distributions over the vocabulary that teachers give N rows, softened."""

    temperature: float
    """Both distributions, theirs and ours, are softened by it, and the divergence is times its square."""

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Of these rows the probabilities p (n, V), float32, and the sum of all p log p, ()."""


class SaidInFull:
    """From the teachers' states, the mean of their probabilities: Freitag et al. (2017), "Ensemble Distillation"."""

    def __init__(self, told: Sequence[tuple[Tensor, Tensor]], temperature: float) -> None:
        """`told`: of each teacher states (N, D') and the projection (V, D') that reads them."""
        self._told = [(states.to(dtype := _product_type(states)), projection.to(dtype)) for states, projection in told]
        self.temperature = temperature

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """As in Said."""
        logits = [(states[rows] @ projection.T).float() for states, projection in self._told]  # each (n, V)
        each = [of_one.div_(self.temperature).softmax(dim=-1) for of_one in logits]
        mean = each[0] if len(each) == 1 else torch.stack(each).mean(dim=0)
        tiny = torch.finfo(mean.dtype).tiny  # where a probability is zero, the logarithm's value does not matter
        return mean, torch.linalg.vecdot(mean, mean.clamp_min(tiny).log_()).sum()


class SaidOfMost:
    """From the likeliest tokens of each row alone: what they leave over is even among all others."""

    def __init__(self, tokens: Tensor, probabilities: Tensor, vocab_size: int, temperature: float) -> None:
        """tokens (N, k) int64, their softened probabilities (N, k) float32, of fewer tokens than the vocabulary has."""
        self.temperature = temperature
        self._tokens, self._probabilities, self._vocab_size = tokens, probabilities, vocab_size

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """As in Said."""
        tokens, most = self._tokens[rows], self._probabilities[rows]
        left = (1 - most.sum(dim=-1, keepdim=True)).clamp_min(0)  # (n, 1)
        even = left / (self._vocab_size - most.shape[1])
        entropy = torch.xlogy(most, most).sum() + torch.xlogy(left, even).sum()
        return even.expand(-1, self._vocab_size).scatter(-1, tokens, most), entropy


@dataclass(frozen=True)
class Distillation:
    """What teachers say of the same rows: Hinton et al. (2015), section 2, word by word (Kim and Rush, 2016, section
    3.1).
    """

    said: Said
    weight: float
    """Of the divergence from what they say, from 0 to 1; the rest is that of the cross-entropy."""


def projected_cross_entropy(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float,
    r_drop: float = 0.0,
    distillation: Distillation | None = None,
) -> Tensor:
    """What `cross_entropy(linear(states, weight), targets)` gives with this label smoothing, summed over rows, mean of
    the passes. Of two passes, which differ by their dropout, half of `r_drop` times the mean of both divergences of
    one's distribution from the other's is added: Liang et al. (2021), "R-Drop", equation (4), halved.

    states (P, N, D) of one or two passes, weight (V, D), targets (N,) int64 -> () float32. Products are in autocast's
    type where it is on. The gradients are worked out on the way and cannot be differentiated again. torch's own
    linear_cross_entropy, in blocks too, takes the way of all logits under autocast, and sums the loss in bf16.
    """
    loss: Tensor = _ProjectedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
        states, weight, targets, label_smoothing, r_drop, distillation, _product_type(states)
    )
    return loss


def _product_type(states: Tensor) -> torch.dtype:
    """Of products with these states, here and now."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Of log-probabilities l, the loss is -(1 - e) l_y - e mean(l), and its gradient by the logits is exp(l) - (1 - e)
    at y - e / V: Szegedy et al. (2016), section 7.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        label_smoothing: float,
        r_drop: float,
        distillation: Distillation | None,
        dtype: torch.dtype,
    ) -> Tensor:
        passes = len(states)
        states_gradient, weight_gradient = torch.empty_like(states), torch.zeros_like(weight)
        projection = weight.to(dtype)  # (V, D)
        loss = torch.zeros((), device=states.device)
        rows = block_rows(states.device) // passes
        for start in range(0, len(targets), rows):
            block = states[:, start : start + rows].to(dtype)  # (P, n, D)
            places = targets[start : start + rows, None].expand(passes, -1, 1)  # (P, n, 1)
            logits = (block @ projection.T).float()  # (P, n, V)
            scores = logits.log_softmax(dim=-1)
            expected = (1 - label_smoothing) * scores.gather(-1, places)
            if label_smoothing:
                expected = expected + label_smoothing * scores.mean(dim=-1, keepdim=True)
            block_loss = -expected.sum()
            if distillation:
                divergence, towards = _from_teachers(logits, scores, distillation, slice(start, start + rows))
            if r_drop:
                between, gradient = _with_divergence(scores, r_drop / 2)
                block_loss += r_drop / 2 * passes * between
            else:
                gradient = scores.exp_()
            gradient.sub_(label_smoothing / len(weight))
            gradient.scatter_add_(-1, places, torch.full_like(expected, label_smoothing - 1))
            if distillation:
                block_loss = torch.lerp(block_loss, divergence, distillation.weight)
                gradient.lerp_(towards, distillation.weight)
            loss += block_loss / passes
            gradient = gradient.div_(passes).to(dtype)
            states_gradient[:, start : start + rows] = gradient @ projection
            weight_gradient += gradient.flatten(0, 1).T @ block.flatten(0, 1)
        ctx.save_for_backward(states_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        states_gradient, weight_gradient = ctx.saved_tensors
        return states_gradient * loss_gradient[0], weight_gradient * loss_gradient[0], *[None] * 5


def _from_teachers(logits: Tensor, scores: Tensor, distillation: Distillation, rows: slice) -> tuple[Tensor, Tensor]:
    """T^2 times the divergence of each pass from what teachers say, both softened by T, summed, and its gradient by the
    logits, T times the difference of the distributions.

    logits (P, n, V) and their log_softmax -> (), (P, n, V).
    """
    temperature = distillation.said.temperature
    theirs, entropy = distillation.said.block(rows)  # (n, V), ()
    ours = scores if temperature == 1 else logits.div(temperature).log_softmax(dim=-1)
    divergence = entropy * len(logits) - torch.linalg.vecdot(theirs.expand_as(ours), ours).sum()
    return divergence * temperature**2, ours.exp().sub_(theirs).mul_(temperature)


def _with_divergence(scores: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Half of KL(p || q) + KL(q || p), summed; and the probabilities plus `weight` times the gradient of both KL by the
    logits of p and q, written over `scores`.

    scores (2, n, V), log p and log q -> (), (2, n, V). By the logits of p, KL(p || q) has the gradient
    p (log p - log q - KL(p || q)), and KL(q || p) has p - q.
    """
    p, q = probabilities = scores.exp()
    ratio = scores[0] - scores[1]  # log p - log q
    forth = torch.linalg.vecdot(p, ratio)[:, None]  # KL(p || q), (n, 1)
    back = -torch.linalg.vecdot(q, ratio)[:, None]  # KL(q || p)
    ratio.mul_(weight)
    torch.add(ratio, 1 + weight - weight * forth, out=scores[0])
    torch.sub(1 + weight - weight * back, ratio, out=scores[1])
    scores.mul_(probabilities)
    scores[0].sub_(q, alpha=weight)
    scores[1].sub_(p, alpha=weight)
    return (forth + back).sum() / 2, scores
