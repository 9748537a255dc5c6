"""RegMean: the linear layer that does on each model's inputs what that model's layer does."""

from __future__ import annotations

from typing import Any

import torch

from espalier.calibrate.store import Calibration, of_models
from espalier.delta.merging import Combine, Parameter, Whole, combination
from espalier.errors import EspalierError
from espalier.registry import merger


def _is_linear(parameter: Parameter, files: list[Calibration]) -> bool:
    return len(parameter.shape) == 2 and all((parameter.name, "second_moment") in file for file in files)


def survey(whole: Whole, *, statistics: list[str] | None = None, **_: Any) -> bool:
    """Whether matrices are stored (in, out), as ``Conv1D`` does: seen by those that are not square."""
    files = of_models(statistics, whole.parameters[0].models, "second_moment")
    linear = [parameter for parameter in whole.parameters if _is_linear(parameter, files)]
    if not linear:
        raise EspalierError(f"{files[0].path} has no second moments of any matrix of these models; is it of such a model?")
    return any(files[0].shape(p.name, "second_moment")[0] == p.shape[0] != p.shape[1] for p in linear)


@merger("regmean", ids=(), paper="arXiv:2212.09849", first_pass="survey")
def regmean(
    parameter: Parameter, *, statistics: list[str] | None = None, alpha: float = 0.9, ridge: float = 1e-6
) -> Combine | torch.Tensor:
    """The linear layer closest to all models' on their own inputs: ``min sum_i w_i |X_i W^T - X_i W_i^T|^2``.

    ``W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1`` with ``G_i = alpha X_i^T X_i / n_i + (1 - alpha) diag(X_i^T X_i / n_i)``.
    What is not a linear layer is the weighted mean, as in the paper. Solved in float64 as what it adds to that mean, so
    inputs that never came give the mean. In memory for each thread: 16 in^2 + 24 in out bytes of one matrix.

    Args:
        statistics: a calibration file with `second_moment` for every model, in the order of the models, separated by commas
        alpha: how much of the moments off the diagonal counts, from 0 to 1
        ridge: times the mean of the diagonal is added to it
    """
    files, shares = of_models(statistics, parameter.models, "second_moment"), parameter.shares()
    if not 0 <= alpha <= 1:
        raise EspalierError(f"alpha is {alpha}; it must be from 0 to 1")
    if not _is_linear(parameter, files):
        return combination(parameter, shares.tolist())
    inputs = files[0].shape(parameter.name, "second_moment")[-1]
    transposed = parameter.shape[1] != inputs or (parameter.shape[0] == inputs and bool(parameter.survey))
    if parameter.shape[0 if transposed else 1] != inputs:
        raise EspalierError(f"its inputs in {files[0].path} are {inputs}; the matrix is {list(parameter.shape)}")

    def weight(model: int | None) -> torch.Tensor:
        stored = parameter.one(model).double()  # (out, in), or as Conv1D has it
        return stored.mT if transposed else stored

    mean = sum(share * weight(model) for model, share in enumerate(shares.double()))
    total = torch.zeros(inputs, inputs, dtype=torch.float64, device=parameter.device)
    pull = torch.zeros_like(mean)  # (out, in)
    for model, (file, share) in enumerate(zip(files, shares.double(), strict=True)):
        moments = file.read(parameter.name, "second_moment").to(parameter.device) * (share / max(sum(file.tokens(parameter.name)), 1))
        diagonal = moments.diagonal().clone()
        moments *= alpha
        moments.diagonal().copy_(diagonal)
        pull += (weight(model) - mean) @ moments
        total += moments
    total.diagonal().add_(ridge * total.diagonal().mean() + 1e-30)
    try:
        made = mean + torch.cholesky_solve(pull.mT, torch.linalg.cholesky(total)).mT
    except torch.linalg.LinAlgError as error:
        raise EspalierError(f"its inputs are too much alike to be solved for with the ridge {ridge}; take a larger one") from error
    made = (made.mT if transposed else made).float()
    if parameter.scale == 1:
        return made
    if not parameter.has_base:
        combination(parameter, [1.0])  # says that a scale needs a base
    return torch.lerp(parameter.one(None), made, parameter.scale)
