"""ComPEFT: the signs of the largest numbers, and one scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from espalier.delta.compression import Compressor, Whole, naming
from espalier.delta.fit import densify
from espalier.delta.forms import Dense, Magnitude, Quantized, Update
from espalier.delta.forms.factored import Start
from espalier.delta.forms.golomb import Golomb, Ternary, signs_at
from espalier.delta.selection import Cut, across, kept, largest
from espalier.delta.trained import leaves_factors, recoded, vectors
from espalier.errors import EspalierError
from espalier.registry import compressor

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@compressor("compeft", ids=(56,), paper="arXiv:2311.13171")
class ComPEFT(Compressor):
    """Keep the signs of the k largest numbers that training changed, and one scale: ``alpha std(tau) sgn(tau)``.

    tau is what was trained minus where it started: B of a LoRA (it started at zero), A minus the A0 that the delta's
    recorded seed draws again, the values of columns, rows and sparse updates, else the dense update. Where A0 is not
    known, A stays as it is; so does what signs would not make smaller. The paper takes k and std over all of tau (``scope="global"``); per tensor is the default
    here, because tensors of other sizes then keep their own scale. Places are stored as bitmaps or as Golomb-coded
    gaps. With validation data alpha is chosen among 0.5, 1, 2, 3, 4, 5, 6, 8 and 10, as in the paper.
    """

    density: float = 0.2
    """k: share of the numbers that keep their sign, in (0, 1]"""
    alpha: float = 1.0
    """the scale is alpha times the rule's; chosen by --data where that is given"""
    scale: Literal["std", "mean"] = "std"
    """the rule: standard deviation of all numbers, or mean magnitude of the kept ones (the least error)"""
    scope: Literal["tensor", "global"] = "tensor"
    """whether k and the rule are taken over each tensor or over the whole delta"""
    code: Literal["smallest", "bitmaps", "golomb"] = "smallest"
    """how the places of the signs are stored"""
    factors: Literal["auto", "B", "both"] = "auto"
    """of low-rank factors: both where the start of A is known, B alone, or both or refuse"""

    def check(self) -> None:
        if not 0 < self.density <= 1:
            raise EspalierError(f"density is {self.density!r}; it must be above 0 and at most 1")
        if not 0 <= self.alpha < float("inf"):
            raise EspalierError(f"alpha is {self.alpha!r}; it must be a finite number of at least 0")

    def candidates(self) -> tuple[Mapping[str, Any], ...]:
        return tuple({"alpha": alpha} for alpha in ALPHAS)

    def begin(self, whole: Whole) -> Cut | None:
        def numbers() -> Iterator[torch.Tensor]:
            for name in whole.compressible():
                with naming(f"{self.name} of {name}"):
                    found = vectors(*self._trained(name, whole.delta.updates[name], whole), self.factors == "B")
                yield from found

        return across(numbers, self.density) if self.scope == "global" else None

    def _trained(self, name: str, update: Update, whole: Whole) -> tuple[Update, Start | None]:
        opened = update.inner if isinstance(update, Quantized) else update
        if opened.depends_on_base and not isinstance(opened, Magnitude):
            return Dense(densify(update, whole.weight(name))), None
        start = whole.start(name, update)
        if self.factors == "both" and leaves_factors(update, start):
            raise EspalierError("where A started is not recorded (no seed that draws it), so what it learnt is not known; use --factors B")
        return update, start

    def compress(self, name: str, update: Update, whole: Whole, state: Cut | None) -> Update:
        return recoded(*self._trained(name, update, whole), lambda tau: self._signs(tau, state), self.factors == "B")

    def _signs(self, tau: torch.Tensor, cut: Cut | None) -> Ternary | Golomb:
        flat = tau.flatten()
        count = min(kept(len(flat), self.density), int(flat.count_nonzero()))
        chosen = cut.take(flat) if cut else largest(flat.abs(), count)
        if self.scale == "std":
            size = cut.std if cut else float(flat.double().std(correction=0))
        else:
            size = cut.mean if cut else float(flat[chosen].double().abs().mean()) if count else 0.0
        return signs_at(tau, chosen, self.alpha * size, self.code)
