"""Muon (Jordan et al., 2024): momentum whose matrix is made orthogonal before each step.

``torch.optim.Muon`` treats one matrix after another in bfloat16; for dozens of tiny matrices on a CPU it takes longer
than the model. This one stacks matrices of one shape and works in float32.
"""

from collections import defaultdict

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic that drives all singular values towards 1


def orthogonalise(x: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Newton–Schulz iteration on matrices [N, R, C]: the nearest (semi-)orthogonal ones, roughly."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, iterations).mT
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights, with Nesterov momentum and steps whose entries have a root mean square of lr / 2."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                ahead = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                updates = orthogonalise(ahead) * (0.5 * max(shape) ** 0.5)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
