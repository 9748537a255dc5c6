"""A low-rank update whose factors are kept in other forms, each as small as it can be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch

from espalier.delta.forms.composite import Composite, read_parts
from espalier.delta.forms.low_rank import ByFactors, LowRank
from espalier.delta.forms.update import Gain, Update, matrix_shape, register_form
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream


class Start(NamedTuple):
    """What A was before it was trained: uniform in +-1/sqrt(in), drawn from the stream (seed, name)."""

    seed: int
    name: str

    def draw(self, *shape: int) -> torch.Tensor:
        """The numbers, float32."""
        return Stream(self.seed, self.name).kaiming_uniform(*shape)


@register_form
class Factored(ByFactors, Composite):
    """``gain * B (A0 + A)`` of forms B, a matrix (..., out, rank), and A, a matrix (..., rank, in).

    A0 is zero, or what ``start`` draws: a LoRA's A is random from the start, and what it learnt is the difference
    (ComPEFT, arXiv:2311.13171). Factors are made once for each object; products are those of ``LowRank``.
    """

    form = "factored"

    def __init__(
        self, B: Update, A: Update, gain: Gain = 1.0, start: Start | None = None, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__({"B": B, "A": A}, gain)
        self.start = start
        self.shape = tuple(shape or (*B.shape[:-1], A.shape[-1]))

    def constants(self) -> dict[str, Any]:
        start = None if self.start is None else self.start._asdict()
        return {**super().constants(), "rank": self.parts["B"].shape[-1], "start": start}

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        rank, start = constants["rank"], constants["start"]
        if type(rank) is not int or not 1 <= rank <= max(outputs, inputs):
            raise EspalierError(f"rank is {rank!r}; it must be an integer from 1 to {max(outputs, inputs):,}")
        if start is not None:
            start = Start(**start)
            if type(start.seed) is not int or not isinstance(start.name, str):
                raise EspalierError(f"the start is of seed {start.seed!r} and name {start.name!r}; they must be an integer and a string")
        if set(constants["parts"]) != {"B", "A"}:
            raise EspalierError(f"the parts are {list(constants['parts'])}; they must be B and A")
        parts = {
            name: read_parts(tensors, {"parts": {name: constants["parts"][name]}}, size, [name], additive_in=cls.form)[name]
            for name, size in {"B": (*lead, outputs, rank), "A": (*lead, rank, inputs)}.items()
        }
        return cls(parts["B"], parts["A"], gain, start, tuple(shape))

    def _with_parts(self, parts: Mapping[str, Update], own: Mapping[str, torch.Tensor]) -> Self:
        other = super()._with_parts(parts, own)
        other.shape = self.shape
        return other

    @cached_property
    def _factors(self) -> LowRank:
        like = torch.empty((), dtype=torch.float32, device="meta")  # the parts are told a dtype; they need no weight
        B, A = self.parts["B"].materialize(like), self.parts["A"].materialize(like)
        if self.start is not None:
            A = A + self.start.draw(*A.shape).to(A.device)
        return LowRank(B, A, 1.0, self.shape)

    def low_rank(self) -> LowRank:
        return LowRank(self._factors.B, self._factors.A, self.gain, self.shape)
