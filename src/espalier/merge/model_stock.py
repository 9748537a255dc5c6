"""Model Stock: towards the base by how far the models disagree."""

from __future__ import annotations

from typing import Literal

import torch

from espalier.delta.merging import Combine, Parameter, Piece, combination
from espalier.registry import merger


@merger("model_stock", ids=(), paper="arXiv:2403.19522")
def model_stock(parameter: Parameter, *, per: Literal["tensor", "row"] = "tensor") -> Combine:
    """The mean of the models, drawn towards the base: ``t mean_i theta_i + (1 - t) theta_0``.

    ``t = N c / (1 + (N - 1) c)`` with c the mean cosine between changes: 1 where they agree, 0 where they are
    orthogonal. t stays in [0, 1]: changes that oppose each other give the base.

    Args:
        per: whether t is of each tensor or of each row (the paper's filters)
    """
    if parameter.models == 1:
        return combination(parameter, [1.0])
    count = parameter.models
    pairs = torch.triu_indices(count, count, 1)

    def ratio(gram: torch.Tensor) -> torch.Tensor:
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        cosines = gram / (norms[..., :, None] * norms[..., None, :]).clamp_min(1e-12)
        mean = cosines[..., pairs[0], pairs[1]].clamp(-1, 1).mean(-1).clamp_min(0)
        return count * mean / (1 + (count - 1) * mean)

    if per == "tensor":
        t = ratio(parameter.gram("updates")).float()
        return lambda piece: piece.origin + parameter.scale * t * piece.updates.mean(0)

    def combine(piece: Piece) -> torch.Tensor:
        rows = piece.updates.transpose(0, 1).double()
        return piece.origin + parameter.scale * ratio(rows @ rows.mT).float()[:, None] * piece.updates.mean(0)

    return combine
