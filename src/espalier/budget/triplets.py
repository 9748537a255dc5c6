"""What methods that grow or prune rank-one terms share: how important their numbers are, and how far they are from orthogonal."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def average_in(sensitivity: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, decay: float) -> None:
    """Enter a step's sensitivity into its moving averages, in place: AdaLoRA (arXiv:2303.10512), eqs. 9 and 10.

    The product of the two is the importance.
    """
    mean.lerp_(sensitivity, 1 - decay)
    deviation.lerp_((sensitivity - mean).abs(), 1 - decay)


def distance_from_orthogonal(factors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The mean of ``||B^T B - I||_F`` and ``||A A^T - I||_F`` over pairs B (..., out, r), A (..., r, in), 0-d: eq. 4 of the same."""
    distances = []
    for B, A in factors:
        identity = torch.eye(B.shape[-1], device=B.device)
        for gram in (B.transpose(-1, -2) @ B, A @ A.transpose(-1, -2)):
            distances.append(torch.linalg.matrix_norm(gram - identity).mean())
    return torch.stack(distances).mean()
