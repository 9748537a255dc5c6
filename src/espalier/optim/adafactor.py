"""Adafactor, from torch: the mean squares of a matrix as a column times a row."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from espalier.errors import EspalierError, at_least
from espalier.kernels import sharded
from espalier.memory.rule import Shape
from espalier.registry import optimizer


@optimizer("adafactor", ids=(), paper="arXiv:1804.04235")
class Adafactor:
    """``w -= alpha u / max(1, RMS(u) / threshold)``, ``u = g / sqrt(V)``, ``alpha = min(lr, 1 / sqrt(t)) max(1e-3, RMS(w))``.

    V of a matrix is the column of its rows' mean squared gradients times the row of its columns', divided by the mean of either; these
    are moving averages with the decay ``1 - t^-exponent``. Steps are relative to the weights: good rates are near 1e-2, where
    AdamW's are near 1e-3. State: a number for each row and column of a matrix (of each expert), one for each of a vector.
    """

    exponent: float = 0.8
    """of the step, in the decay of the mean squares, more than 0"""
    threshold: float = 1.0
    """root mean square of an update above which it is scaled down, more than 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    state = "fp32"

    def check(self) -> None:
        if self.state != "fp32":
            raise EspalierError(f"state is {self.state}; adafactor, which is torch's, keeps what little state it has in fp32")
        at_least("weight_decay", self.weight_decay, 0)
        for name in ("exponent", "threshold"):
            if not getattr(self, name) > 0:
                raise EspalierError(f"{name} is {getattr(self, name)}; it must be more than 0")

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer over named parameters; decay acts on those of two or more dimensions.

        Raises:
            EspalierError: where one is sharded, over which torch's does not go.
        """
        sharded.refuse(parameters.items(), "torch's adafactor needs")
        matrices, others = ([p for p in parameters.values() if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups = [{"params": some, "weight_decay": decay} for some, decay in ((matrices, self.weight_decay), (others, 0.0)) if some]
        return _Renewing(groups, lr=learning_rate, beta2_decay=-self.exponent, d=self.threshold)

    def step_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes that a step holds beside gradients and state: of two parameters at a time, V, which becomes the update."""
        return 4 * sum(sorted(map(math.prod, shapes.values()))[-2:])

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Nothing is refused: it moves whatever trains."""

    def state_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of state for parameters of these names and shapes."""
        return 4 * sum(math.prod(s[:-2]) * (s[-2] + s[-1]) if len(s) > 1 else math.prod(s) for s in shapes.values())


class _Renewing(torch.optim.Adafactor):
    """Numbers that take the place of others begin with the mean square of those that stay: with none, their first step would be all of the update."""

    def renew(
        self, parameter: torch.nn.Parameter, places: torch.Tensor, gradients: torch.Tensor | None, squares: torch.Tensor | None, steps: int
    ) -> None:
        """See :meth:`espalier.memory.rule.Ruled.renew`. A column and a row of mean squares are of no single number: they stay."""
        variance = self.state[parameter].get("variance")
        if variance is not None:
            variance[places] = variance[~places].mean().nan_to_num() if squares is None else squares[places].to(variance.dtype)
