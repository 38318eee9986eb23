"""Muon for the weight matrices: momentum, then an orthogonalised update.

The update of each matrix is replaced by the nearest semi-orthogonal matrix, found
by a quintic Newton-Schulz iteration in bf16, and scaled by ``0.2 * sqrt(longer
side)`` so that its typical element is as large as an AdamW update and both
optimizers can share one learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Matrices [n, rows, columns] with rows <= columns -> nearly semi-orthogonal ones."""
    a, b, c = COEFFICIENTS
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised update, decoupled weight decay."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                alike[min(p.shape), max(p.shape)].append(p)
            for (rows, columns), params in alike.items():
                grads = [p.grad for p in params]
                bufs = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(bufs, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, bufs, group["momentum"])
                stack = torch.stack([u if u.shape[0] == rows else u.mT for u in updates])
                stack = orthogonalise(stack).to(params[0].dtype)
                out = [u if p.shape[0] == rows else u.mT for p, u in zip(params, stack, strict=True)]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, out, alpha=-0.2 * columns**0.5 * group["lr"])
