"""ScaLearn over low-rank deltas: their updates, trained on other tasks, each scaled by learned numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.target import Target
from espalier.attach.method import Adapter, Tensors
from espalier.delta import store
from espalier.delta.forms import LowRank
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream
from espalier.registry import adapter


@adapter("scalearn-lora", ids=(91,), paper="arXiv:2310.01217", learning_rate=6e-3, size="", needs="sources")
class ScaLearnLoRA(Adapter):
    """Add the updates of S trained, frozen low-rank deltas, their outputs scaled: ``W' = W + sum_s diag(omega_s) B_s A_s``.

    omega (S, out) of every matrix trains, without softmax and without a sum of one; it starts normal around ``total / S`` with
    deviation 0.001. Variants of the paper: ``uniform``, one number a source, omega (S, 1); ``shared`` ("++"), one omega for
    all matrices (with as many outputs). Dropout acts on the coefficients. What is stored is an ordinary low-rank delta, of
    the sum of the sources' ranks. The paper has bottleneck adapters as sources, as the branch ``scalearn`` does; an update
    merges into the weights.
    """

    sources: str = ""
    """directories of the sources' deltas, such as those of lora, separated by commas"""
    uniform: bool = False
    """one number for each source, not one for each output"""
    shared: bool = False
    """the same numbers for all matrices"""
    total: float = 2.0
    """what the coefficients of all sources start to sum to; 1 is their average"""
    omega_dropout: float = 0.3
    """probability that a coefficient is dropped in a training step, in [0, 1)"""

    def check(self) -> None:
        if not 0 <= self.omega_dropout < 1:
            raise EspalierError(f"omega_dropout is {self.omega_dropout}; it must be at least 0 and less than 1")
        self._deltas = [store.load(Path(part.strip()), mapped=True) for part in self.sources.split(",") if part.strip()]
        if not self._deltas:
            raise EspalierError(f"sources is {self.sources!r}; give the directories of trained deltas, such as those of lora")

    def _factors(self, target: Target) -> list[LowRank]:
        """What every source has for a parameter."""
        found = []
        for delta in self._deltas:
            update = delta.updates.get(target.name)
            factors = update.low_rank() if update is not None else None
            if factors is None or factors.shape != target.shape:
                what = "nothing" if update is None else f"an update of form {update.form} and shape {update.shape}"
                raise EspalierError(f"the source {delta.folder} has {what} for {target.name}; it must be of low rank and shape {target.shape}")
            found.append(factors)
        return found

    def _width(self, target: Target) -> int:
        return 1 if self.uniform else target.outputs

    def _omega(self, width: int, stream: Stream) -> nn.Parameter:
        return nn.Parameter(self.total / len(self._deltas) + 0.001 * stream.gaussian(len(self._deltas), width))

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        factors = self._factors(target)
        tensors: Tensors = {
            "B": torch.cat([f.B.float() * f.gain for f in factors], -1),  # (..., out, sum of ranks)
            "A": torch.cat([f.A.float() for f in factors], -2),
            "source": torch.tensor([number for number, f in enumerate(factors) for _ in range(f.rank)]),
        }
        return tensors if self.shared else {**tensors, "omega": self._omega(self._width(target), stream)}

    def start_shared(self, targets: Sequence[Target], stream: Stream) -> Tensors:
        widths = sorted({self._width(target) for target in targets}) if self.shared else []
        return {f"omega_{width}": self._omega(width, stream.named(f"omega {width}")) for width in widths}

    def prepare(self, pool: Any, targets: Sequence[Target]) -> Mapping[str, torch.Tensor]:
        return {target.name: getattr(pool, f"omega_{self._width(target)}") for target in targets}

    def _scaled(self, part: Any, omega: torch.Tensor) -> LowRank:
        return LowRank(part.B * omega.index_select(0, part.source).T, part.A, part.gain)

    def update(self, part: Any, context: torch.Tensor | None) -> LowRank:
        omega = part.omega if context is None else context
        return self._scaled(part, functional.dropout(omega, self.omega_dropout, part.training))

    def export(self, part: Any, pool: Any) -> LowRank:
        return self._scaled(part, getattr(pool, f"omega_{self._width(part.target)}") if self.shared else part.omega)

    def start_bound(self, target: Target) -> float:
        share = abs(self.total) / len(self._deltas) + 0.01
        return share * sum(float((f.B.abs() @ f.A.abs()).max() * abs(float(f.gain))) for f in self._factors(target))

    def count(self, target: Target) -> int:
        return 0 if self.shared else len(self._deltas) * self._width(target)

    def count_shared(self, targets: Sequence[Target]) -> int:
        return len(self._deltas) * sum({self._width(target) for target in targets}) if self.shared else 0
