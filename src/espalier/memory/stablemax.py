"""StableMax in the place of softmax in a cross-entropy (arXiv:2501.04697): ``p_i = s(x_i) / sum_j s(x_j)``.

``s(x) = x + 1`` from 0 on and ``1 / (1 - x)`` below it, so logits that lead by much still leave a loss and a gradient, where
float32 rounds those of softmax to exactly zero ("softmax collapse"). The loss of target y is ``log(1 + r / s(x_y))`` with r the sum
of s over all others: written so, nothing cancels, and float32 logits suffice where the official code goes to float64.
"""

from __future__ import annotations

import torch

_ROWS = 32


def stablemax_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each of the targets (n,) from logits (n, classes): float64, for autograd."""
    x = logits.double()
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    right = s.gather(-1, targets[:, None])
    others = s.scatter(-1, targets[:, None], 0.0).sum(-1, keepdim=True)
    return torch.log1p(others / right).squeeze(-1)


def losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same losses, and the gradient of each in float32.

    dL / dx_j = s'(x_j) / S, and for the target -s'(x_y) r / (S s(x_y)), where S = r + s(x_y), s' = 1 from 0 on and s^2 below.
    """
    targets = targets[:, None]
    below = logits < 0
    s = logits.abs().float().add_(1)
    for some, mask in zip(s.split(_ROWS), below.split(_ROWS), strict=True):  # no further tensor as large as the logits
        torch.where(mask, some.reciprocal(), some, out=some)
    right = s.gather(-1, targets).double()
    slope = torch.where(below.gather(-1, targets), right.square(), 1.0)
    others = s.scatter_(-1, targets, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    total = others + right
    gradient = s.square_().masked_fill_(below.logical_not_(), 1.0).div_(total)
    gradient.scatter_(-1, targets, (-slope * others / (total * right)).float())
    return torch.log1p(others / right).squeeze(-1), gradient
