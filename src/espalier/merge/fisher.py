"""Fisher-weighted averaging: every number of every model weighed by how much the model's output depends on it."""

from __future__ import annotations

from typing import Any

import torch

from espalier.calibrate.store import of_models
from espalier.delta.merging import Combine, Parameter, Piece, Whole, scaled
from espalier.errors import EspalierError
from espalier.registry import merger


def survey(whole: Whole, *, statistics: list[str] | None = None, normalize: bool = False, **_: Any) -> torch.Tensor:
    """What each model's Fisher information is multiplied by, (models,): 1 / sequences, or 1 / its norm over the whole model."""
    files = of_models(statistics, whole.parameters[0].models, "fisher")
    if not normalize:
        return torch.tensor([1 / max(int(file.facts["sequences"]), 1) for file in files])

    def squares(parameter: Parameter) -> torch.Tensor:
        total = torch.zeros(len(files), dtype=torch.float64)
        for start in range(0, parameter.numel, 1 << 17):
            size = min(1 << 17, parameter.numel - start)
            total += torch.stack([file.part(parameter.name, "fisher", start, size).square().sum() for file in files])
        return total

    return (1 / sum(whole.each(squares)).sqrt().clamp_min(1e-30)).float()


@merger("fisher", ids=(), paper="arXiv:2111.09832", first_pass="survey")
def fisher(parameter: Parameter, *, statistics: list[str] | None = None, floor: float = 1e-6, normalize: bool = False) -> Combine:
    """The mean of models weighed number by number by their Fisher information: ``sum_i w_i F_i theta_i / sum_i w_i F_i``.

    F is the diagonal of the empirical Fisher information, the mean over sequences. It is read slice by slice.

    Args:
        statistics: a calibration file with `fisher` for every model, in the order of the models, separated by commas
        floor: least Fisher information of a number; where no model depends on it, it is the plain mean
        normalize: divide each model's Fisher information by its norm over the whole model, so that none counts more for its scale
    """
    files, factors = of_models(statistics, parameter.models, "fisher"), parameter.survey
    for file in files:
        if (shape := file.shape(parameter.name, "fisher")) != parameter.shape:
            raise EspalierError(f"its Fisher information in {file.path} is {list(shape)}; the tensor is {list(parameter.shape)}")

    def combine(piece: Piece) -> torch.Tensor:
        over, under = torch.zeros_like(piece.models[0]), torch.zeros_like(piece.models[0])
        for model, file, factor, weight in zip(piece.models, files, factors, parameter.weights, strict=True):
            information = file.part(parameter.name, "fisher", piece.start, model.numel()).view_as(model).to(model)
            share = (information * factor).clamp_min_(floor) * weight
            over.addcmul_(share, model)
            under += share
        return over / under

    return scaled(parameter, combine)
