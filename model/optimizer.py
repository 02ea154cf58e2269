"""What moves the weights: the optimizers, the learning rate over the steps, and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam, Muon, Optimizer

from model.recipe import TrainingConfig


def rate_factor(step: int, config: TrainingConfig) -> float:
    """Rate of a step (0 first) as a share of the highest: linear warm-up, inverse square root, linear cool-down."""
    warmup = max(config.warmup_steps, 1)
    factor = min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
    if config.cooldown_steps:
        factor *= min(1.0, (config.max_steps - step) / config.cooldown_steps)
    return max(factor, 0.0)


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
    """Adam for everything, or Muon for the matrices inside layers and Adam for embeddings, norms and biases.

    Muon's rate is scaled so that its updates are as large as Adam's (Liu et al., 2025), so one rate serves both.
    """
    rate, decay = config.learning_rate, config.weight_decay
    named = dict(model.named_parameters())  # a shared parameter once
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = {
        name: p
        for name, p in named.items()
        if config.optimizer == "muon" and name in linears and "output_projection" not in name
    }
    rest = [p for name, p in named.items() if name not in matrices]
    optimizers: list[Optimizer] = [
        Adam(rest, lr=rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=decay, decoupled_weight_decay=True, fused=True)
    ]
    if matrices:
        optimizers.append(
            Muon(matrices.values(), lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class MovingAverage:
    """Exponential moving average of the weights, kept beside them (Polyak and Juditsky, 1992)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step. Early steps weigh more, so that the random start is soon forgotten."""
        decay = min(self.decay, (step + 1) / (step + 10))
        current = model.state_dict()
        averages: list[Tensor] = list(self.weights.values())
        torch._foreach_lerp_(averages, [current[name] for name in self.weights], 1.0 - decay)
