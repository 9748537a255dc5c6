"""Keeping the largest of many numbers, exactly as many as asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def largest(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Masks of the ``count`` largest of all numbers; of equal ones, those that come first.

    Args:
        scores: tensors of any shapes.
        count: from 0 to how many numbers there are; exactly so many are kept.

    Returns:
        A boolean mask for each tensor, of its shape.
    """
    flat = torch.cat([score.reshape(-1) for score in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]
