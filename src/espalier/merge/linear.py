"""Weighted mean of models."""

from __future__ import annotations

import torch

from espalier.delta.merging import Combine, Parameter, Piece
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("linear", ids=(), paper="arXiv:2203.05482")
def linear(parameter: Parameter, *, normalize: bool = True) -> Combine:
    """The weighted mean of the models themselves (a uniform soup by default): ``sum_i w_i theta_i / sum_i w_i``.

    Args:
        normalize: whether the weights are divided by their sum
    """
    weights = parameter.weights
    if normalize:
        total = weights.sum()
        if float(total) == 0:
            raise EspalierError("the weights sum to 0; give others, or --no-normalize")
        weights = weights / total

    def combine(piece: Piece) -> torch.Tensor:
        return torch.einsum("n,nrc->rc", weights, piece.models)

    return combine
