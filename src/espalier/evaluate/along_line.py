"""The loss along the straight line between two live models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional

from espalier.calibrate.pair import Text
from espalier.data.batches import IGNORED


@torch.no_grad()
def loss(model: Any, batches: Text) -> float:
    """Mean loss in nats per target token."""
    total, count = 0.0, 0
    for ids, targets in batches:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((targets != IGNORED).sum())
    return total / max(count, 1)


@torch.no_grad()
def along(a: Any, b: Any, batches: Text, points: int) -> list[float]:
    """The losses at ``points`` equidistant places from A to B, both ends among them; a third model is in memory."""
    between = copy.deepcopy(a)
    losses = []
    for place in range(points):
        share = place / (points - 1)
        for mixed, one, other in zip(between.parameters(), a.parameters(), b.parameters(), strict=True):
            mixed.copy_(torch.lerp(one, other, share))
        losses.append(loss(between, batches))
    return losses
