"""Sparse model soups: the mean of models that were retrained under one pruning mask."""

from __future__ import annotations

import torch

from espalier.delta.merging import Combine, Parameter, combination
from espalier.errors import EspalierError
from espalier.registry import merger


@merger("sparse_soup", ids=(285,), paper="arXiv:2306.16788")
def sparse_soup(parameter: Parameter, *, sparsity: float = 0.05) -> Combine:
    """The weighted mean of pruned models, which must have their zeros in the same places, so that it is as sparse as they are.

    ``sum_i w_i theta_i / sum_i w_i``, refused where masks differ. One phase of the paper is: prune, retrain copies with the
    mask kept, and this.

    Args:
        sparsity: a tensor counts as pruned where a model has at least this share of zeros; others may have stray zeros
    """
    zeros, unequal = torch.zeros(parameter.models, dtype=torch.int64), 0
    for piece in parameter.pieces():
        empty = piece.models.flatten(1) == 0
        zeros += empty.sum(1).cpu()
        unequal += int((empty.any(0) & ~empty.all(0)).sum())
    if unequal and int(zeros.max()) >= sparsity * parameter.numel:
        raise EspalierError(
            f"its zeros are not in the same places in all models: {unequal} of {parameter.numel} numbers are 0 in some only "
            f"({', '.join(map(str, zeros.tolist()))} zeros), and their mean would be less sparse; retrain with one mask, or use linear"
        )
    return combination(parameter, parameter.shares().tolist())
