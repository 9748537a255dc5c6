"""The loss of dense and of sparse pretraining from one law: that of the parameters that a run had on average.

The Journey Matters (arXiv:2501.12486). Pure functions; when how much is pruned is ``budget/gradual.py``'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy

from espalier.errors import EspalierError


@dataclass(frozen=True)
class Law:
    """``L = E + A / N^alpha + B / D^beta``: N the average of the parameter counts of all steps, D tokens, L in nats.

    N counts the matrices of the blocks alone; of a dense run it is their size.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, mean_parameters: float, tokens: float) -> float:
        return self.E + self.A / mean_parameters**self.alpha + self.B / tokens**self.beta


@dataclass(frozen=True)
class Outcome:
    """What a run reached: ``mean_parameters`` as pretraining's result has it, tokens, and the loss in nats."""

    mean_parameters: float
    tokens: float
    loss: float


def compute(mean_parameters: float, tokens: float) -> float:
    """Floating-point operations of a run, about ``6 N D``."""
    return 6 * mean_parameters * tokens


def fit(runs: Sequence[Outcome]) -> Law:
    """The law of one's own runs, by least squares in the logarithm of the loss; no published coefficients were found.

    Raises:
        EspalierError: for fewer than five runs, numbers that are not positive, or runs of one size or of one length, which cannot tell its five numbers apart.
    """
    if (least := min((min(astuple(run)) for run in runs), default=1.0)) <= 0:
        raise EspalierError(f"a run has {least}; its parameters, its tokens and its loss must be more than 0")
    if len(runs) < 5 or len({run.mean_parameters for run in runs}) < 3 or len({run.tokens for run in runs}) < 3:
        raise EspalierError(f"{len(runs)} runs do not determine the law; give 5 or more, of 3 or more sizes and 3 or more lengths")
    from scipy.optimize import least_squares

    N, D, L = (numpy.array(column, dtype=numpy.float64) for column in zip(*map(astuple, runs), strict=True))

    def residuals(x: numpy.ndarray) -> numpy.ndarray:
        E, a, alpha, b, beta = x  # a and b: logarithms of what the terms are at the smallest run
        return numpy.log(numpy.exp(E) + numpy.exp(a) * (N / N.min()) ** -alpha + numpy.exp(b) * (D / D.min()) ** -beta) - numpy.log(L)

    starts = [
        [math.log(share * L.min()), math.log((1 - share) * L.max() / 2), alpha, math.log((1 - share) * L.max() / 2), beta]
        for share in (0.3, 0.6, 0.9)
        for alpha in (0.2, 0.5)
        for beta in (0.2, 0.5)
    ]
    best = min((least_squares(residuals, start, xtol=1e-12, ftol=1e-12, gtol=1e-12) for start in starts), key=lambda found: found.cost)
    E, a, alpha, b, beta = best.x
    return Law(math.exp(E), math.exp(a) * N.min() ** alpha, float(alpha), math.exp(b) * D.min() ** beta, float(beta))
