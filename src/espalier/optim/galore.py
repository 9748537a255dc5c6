"""GaLore: Adam in the leading singular space of the gradient."""

from __future__ import annotations

from typing import Literal

from espalier.memory.subspace import Choice, LowDimensional
from espalier.registry import optimizer


@optimizer("galore", ids=(), paper="arXiv:2403.03507")
class GaLore(LowDimensional):
    """``w -= lr (scale P rule(P^T G) + decay w)`` for matrices of the blocks, P the r leading singular vectors of G every ``every`` steps.

    P is on the shorter side. Moments stay as they are when P changes, as in the official code. State: two numbers for
    each of R, ``r max(out, in)``, and P.
    """

    rank: int = 128
    """r, at least 1; no more than the shorter side"""
    every: int = 200
    """steps between choices of P"""
    scale: float = 0.25
    """of the step in the subspace"""
    choice: Choice = "svd"
    """P by the singular value decomposition, by a randomized sketch of it, or at random"""
    moments: Literal["keep", "reset", "rotate"] = "keep"
    """what becomes of the moments when P changes; rotate: the mean is expressed in the new P"""
    staggered: bool = True
    """choose one matrix's P after the other's, so that no step waits for all"""
    rule: str = "adamw"
    """the optimizer that has the state"""
    beta1: float = 0.9
    """decay of the mean, in [0, 1)"""
    beta2: float = 0.999
    """decay of the mean square, in [0, 1)"""
    epsilon: float = 1e-6
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""
