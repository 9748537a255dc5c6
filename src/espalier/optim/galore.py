"""GaLore: Adam in the leading singular space of the gradient."""

from __future__ import annotations

from espalier.memory.subspace import OnProjector
from espalier.registry import optimizer


@optimizer("galore", ids=(), paper="arXiv:2403.03507")
class GaLore(OnProjector):
    """``w -= lr (scale P rule(P^T G) + decay w)`` for matrices of the blocks, P the r leading singular vectors of G every ``every`` steps.

    P is on the shorter side. Moments stay as they are when P changes, as in the official code. State: two numbers for
    each of R, ``r max(out, in)``, and P.
    """
