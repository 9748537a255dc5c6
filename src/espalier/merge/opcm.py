"""OPCM: models merged one after another, each new change orthogonal to what is there."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch

from espalier.delta.merging import Parameter, Whole
from espalier.errors import EspalierError
from espalier.registry import merger


def projected(change: torch.Tensor, there: torch.Tensor, alpha: float) -> torch.Tensor:
    """What a change (out, in) adds to the merged change (out, in): none of its leading block, none of its singular directions.

    With ``there = U S V^T`` and ``C = U^T D V``, C's diagonal and leading k x k block are set to 0, k the place where the
    singular values first sum to more than alpha of all. What is outside of U and V stays, so the full SVD is not needed.
    """
    U, S, V = torch.linalg.svd(there, full_matrices=False)
    if not float(S[0]):
        return change
    k = int((S.cumsum(0) / S.sum() <= alpha).sum()) if alpha < 1 else len(S)
    C = U.mT @ change @ V.mT
    diagonal = torch.diag(C.diagonal().clone())
    removed = diagonal
    removed[:k, :k] = C[:k, :k]
    return change - U @ removed @ V


def merged(parameter: Parameter, alpha: float, embeddings: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum of projected changes before it is rescaled, squared norm of every model's change).

    The official code rescales after each model and undoes it before the next; as singular vectors do not change with scale,
    only the last rescaling matters.
    """
    is_linear = len(parameter.shape) == 2 and not any(fnmatch.fnmatchcase(parameter.name, glob) for glob in embeddings.split(","))
    total, squares = torch.zeros(parameter.rows, parameter.columns, device=parameter.device), torch.zeros(parameter.models, dtype=torch.float64)
    for model, weight in enumerate(parameter.weights):
        change = parameter.change(model).mul_(weight)
        squares[model] = torch.linalg.vector_norm(change, dtype=torch.float64).square()
        total += projected(change, total, alpha) if is_linear and model else change
    return total, squares


def survey(whole: Whole, *, alpha: float = 0.5, embeddings: str = "*embed*,*wte*,*wpe*", **_: Any) -> float:
    """What the merged change is multiplied by, so that its norm over the whole model is the mean norm of the changes."""

    def norms(parameter: Parameter) -> torch.Tensor:
        total, squares = merged(parameter, alpha, embeddings)
        return torch.cat([squares, torch.linalg.vector_norm(total, dtype=torch.float64).square()[None].cpu()])

    found = sum(whole.each(norms)).sqrt()
    return float(found[:-1].mean() / found[-1]) if float(found[-1]) else 1.0


@merger("opcm", ids=(259,), paper="arXiv:2501.09522", first_pass="survey")
def opcm(parameter: Parameter, *, alpha: float = 0.5, embeddings: str = "*embed*,*wte*,*wpe*") -> torch.Tensor:
    """Merge models in their order, projecting each change of a matrix away from what was merged before.

    ``M_t = theta_0 + (lambda_{t-1} P + D') / lambda_t``: P what was merged, D' the new change D less its parts along P's
    singular pairs and within its leading ones, lambda_t so that the norm over the whole model is the mean norm of the
    changes so far. Other parameters are summed. In memory for each thread: two changes of one matrix and its SVD, however
    many models; every SVD is done twice, once for the norm. Weights multiply the changes.

    Args:
        alpha: share of the sum of singular values that the protected block holds, from 0 to 1
        embeddings: globs, separated by commas, of matrices that are no linear layers and are summed
    """
    if not 0 <= alpha <= 1:
        raise EspalierError(f"alpha is {alpha}; it must be from 0 to 1")
    total, _ = merged(parameter, alpha, embeddings)
    return parameter.one(None).add_(total, alpha=float(parameter.survey) * parameter.scale)
