"""What moves the weights: the optimizers, the learning rate over the steps, and the moving average of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from model.recipe import TrainingConfig


def rate_factor(step: int, config: TrainingConfig) -> float:
    """Rate of a step (0 first) as a share of the highest: linear warm-up, inverse square root, linear cool-down."""
    warmup = max(config.warmup_steps, 1)
    factor = min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
    if config.cooldown_steps:
        factor *= min(1.0, (config.max_steps - step) / config.cooldown_steps)
    return max(factor, 0.0)


class Muon(Optimizer):
    """Muon (Jordan et al., 2024), for matrices: steps along the momentum with all of its singular values near one. They
    are scaled to be as large as Adam's (Liu et al., 2025), so one rate serves both.

    torch.optim.Muon does the same a matrix at a time and always in bf16, which adds two seconds to a step of
    Transformer-Tiny on a processor without instructions for it. Here matrices of one shape go together, in `dtype`.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure: gradients are there when it is called
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                gradients = [matrix.grad for matrix in matrices]
                momenta = [self._momentum(matrix) for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
                directions = orthogonalised(torch.stack(ahead).to(self.dtype)).to(matrices[0].dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, directions.unbind(), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with their singular vectors and other singular values: between 0.6 and 1.3, but for those that
    were far below the largest. Five steps of Newton and Schulz by Jordan's polynomial.
    """
    wide = matrices.mT if matrices.size(1) > matrices.size(2) else matrices
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if wide is not matrices else x


def build_optimizers(model: nn.Module, config: TrainingConfig, dtype: torch.dtype) -> list[Optimizer]:
    """Adam for everything, or Muon, its products in `dtype`, for the matrices inside layers and Adam for the rest."""
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
        optimizers.append(Muon(matrices.values(), rate, decay, dtype))
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
