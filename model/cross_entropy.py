"""Cross-entropy of a projection to the vocabulary that never holds all of its logits.

Logits and their gradient are the largest tensors of a small model's training by far, and writing and reading them took
most of a step. Here a block of rows goes from states to gradients while it is in the processor's cache.

Letters in the shape comments: P passes, N rows, n rows of a block, D = d_model, V the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 256
"""Rows at a time: with 10,000 tokens 10 MB of float32. From 64 to 256 the time is the same."""


def projected_cross_entropy(
    states: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, r_drop: float = 0.0
) -> Tensor:
    """What `cross_entropy(linear(states, weight), targets)` gives with this label smoothing, summed over rows, mean of
    the passes. Of two passes, which differ by their dropout, half of `r_drop` times the mean of both divergences of
    one's distribution from the other's is added: Liang et al. (2021), "R-Drop", equation (4), halved.

    states (P, N, D) of one or two passes, weight (V, D), targets (N,) int64 -> () float32. Products are in autocast's
    type where it is on. The gradients are worked out on the way and cannot be differentiated again. torch's own
    linear_cross_entropy, in blocks too, takes the way of all logits under autocast, and sums the loss in bf16.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    loss: Tensor = _ProjectedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
        states, weight, targets, label_smoothing, r_drop, dtype
    )
    return loss


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
        dtype: torch.dtype,
    ) -> Tensor:
        passes = len(states)
        states_gradient, weight_gradient = torch.empty_like(states), torch.zeros_like(weight)
        projection = weight.to(dtype)  # (V, D)
        loss = torch.zeros((), device=states.device)
        for start in range(0, len(targets), _BLOCK):
            block = states[:, start : start + _BLOCK].to(dtype)  # (P, n, D)
            places = targets[start : start + _BLOCK, None].expand(passes, -1, 1)  # (P, n, 1)
            logits = (block @ projection.T).float()  # (P, n, V)
            scores = logits.sub_(logits.logsumexp(dim=-1, keepdim=True))  # log-probabilities
            expected = (1 - label_smoothing) * scores.gather(-1, places)
            if label_smoothing:
                expected = expected + label_smoothing * scores.mean(dim=-1, keepdim=True)
            loss -= expected.sum() / passes
            if r_drop:
                probabilities = scores.exp()
                divergence, gradient = _divergence(scores, probabilities)
                loss += r_drop / 2 * divergence
                gradient.mul_(r_drop / 2 * passes).add_(probabilities)
            else:
                gradient = scores.exp_()
            gradient.sub_(label_smoothing / len(weight))
            gradient.scatter_add_(-1, places, torch.full_like(expected, label_smoothing - 1))
            gradient = gradient.div_(passes).to(dtype)
            states_gradient[:, start : start + _BLOCK] = gradient @ projection
            weight_gradient += gradient.flatten(0, 1).T @ block.flatten(0, 1)
        ctx.save_for_backward(states_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *loss_gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        states_gradient, weight_gradient = ctx.saved_tensors
        return states_gradient * loss_gradient[0], weight_gradient * loss_gradient[0], None, None, None, None


def _divergence(scores: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Half of KL(p || q) + KL(q || p), summed, and its gradient by the logits of p and q.

    scores and probabilities (2, n, V) -> (), (2, n, V). By the logits of p, KL(p || q) has the gradient
    p (log p - log q - KL(p || q)), and KL(q || p) has p - q.
    """
    further = scores - scores.flip(0)  # log p - log q, log q - log p
    both = (probabilities * further).sum(dim=-1, keepdim=True)  # KL(p || q), KL(q || p)
    gradient = further.sub_(both).mul_(probabilities).add_(probabilities).sub_(probabilities.flip(0)).div_(2)
    return both.sum() / 2, gradient
