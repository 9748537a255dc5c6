"""SCE: select by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

import torch

from espalier.delta.merging import Combine, Parameter, Piece
from espalier.errors import EspalierError
from espalier.kernels.merging import agree, variance
from espalier.registry import merger


@merger("sce", ids=(), paper="arXiv:2408.07990")
def sce(parameter: Parameter, *, density: float = 1.0) -> Combine:
    """Keep the places where the models differ most, weigh each model by its energy there, erase minority signs, average.

    ``eta_i = |t_i|^2 / sum_j |t_j|^2`` over the kept places of a tensor; signs are elected by ``sum_i t_i``. The models'
    own weights multiply eta.

    Args:
        density: share of the places with any variance that is kept, those of greatest variance
    """
    if not 0 <= density <= 1:
        raise EspalierError(f"density is {density}; it must be from 0 to 1")

    def spread(piece: Piece) -> torch.Tensor:
        return variance(piece.updates.flatten(1)).view(1, *piece.updates.shape[1:])

    kept = None
    if density < 1:
        varied = sum(int(torch.count_nonzero(spread(piece))) for piece in parameter.pieces())
        kept = parameter.largest([int(varied * density)], spread)

    def selected(piece: Piece) -> torch.Tensor:
        return piece.updates if kept is None else piece.updates.mul_(kept(spread(piece)).float())

    energy = torch.zeros(parameter.models, dtype=torch.float64)
    for piece in parameter.pieces():
        changes = selected(piece).flatten(1)
        energy += torch.stack([change @ change for change in changes]).double().cpu()
    if kept is not None:
        kept.again()
    energy = energy * parameter.weights.double()
    weights = (energy / energy.sum() if float(energy.sum()) > 0 else parameter.shares().double()).float()

    def combine(piece: Piece) -> torch.Tensor:
        changes = selected(piece).flatten(1)
        return agree(piece.origin.flatten(), changes, weights, parameter.scale).view_as(piece.origin)

    return combine
