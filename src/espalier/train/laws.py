"""Learning rates and batch sizes for pretraining, from the size of the model and of the data.

Pure functions of published fits; each says for what it was fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from espalier.errors import EspalierError

STEP_LAW_PARAMETERS = (0.06e9, 2.2e9)
STEP_LAW_TOKENS = (2e9, 100e9)


@dataclass(frozen=True)
class Advice:
    """A peak learning rate, a batch in tokens, and whether the law was fitted on runs of such a size."""

    learning_rate: float
    batch_tokens: int
    is_fitted: bool


def step_law(parameters: int, tokens: int) -> Advice:
    """Step Law (arXiv:2503.04715): ``lr = 1.79 N^-0.713 D^0.307``, ``batch = 0.58 D^0.571`` tokens.

    Fitted for AdamW, a cosine to a rate of 1e-5, sequences of 2,048 tokens; N from 60 M to 2.2 B (all experts of a mixture), D from
    2 to 100 B. The bootstrap's standard deviations of the exponents are 0.030, 0.019 and 0.019.

    Args:
        parameters: N, those of the blocks: without embedding and head.
        tokens: D, of the whole run.

    Raises:
        EspalierError: when one of them is not positive.
    """
    if parameters < 1 or tokens < 1:
        raise EspalierError(f"a model of {parameters} parameters and a run of {tokens} tokens have no learning rate; both must be at least 1")
    inside = STEP_LAW_PARAMETERS[0] <= parameters <= STEP_LAW_PARAMETERS[1] and STEP_LAW_TOKENS[0] <= tokens <= STEP_LAW_TOKENS[1]
    return Advice(1.79 * parameters**-0.713 * tokens**0.307, max(1, round(0.58 * tokens**0.571)), inside)


def minicpm_batch(loss: float) -> int:
    """MiniCPM's best batch in tokens for the loss that a run reaches, ``1.21e9 / L^6.24`` (arXiv:2404.06395, section 3.2)."""
    if not loss > 0:
        raise EspalierError(f"loss is {loss}; it must be more than 0")
    return max(1, round(1.21e9 / loss**6.24))


POWER = (4.0, -0.51)
"""a and b of the Power scheduler (arXiv:2408.13359): b is that of the official code; a is 4 to 4.6 by its text."""


def knee(peak: float, sequences: int, a: float = POWER[0], b: float = POWER[1]) -> float:
    """After how many tokens the Power scheduler ``min(peak, B a n^b)`` leaves the peak; a batch has ``sequences``, B."""
    return math.exp(math.log(peak / (sequences * a)) / b)
