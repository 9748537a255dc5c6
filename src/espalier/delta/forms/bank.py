"""A bank of low-rank skills, mixed for each of several tasks: the form of Polytropon and MHR."""

from __future__ import annotations

import torch

from espalier.delta.forms.low_rank import ByFactors, LowRank
from espalier.delta.forms.update import (
    Gain,
    expect,
    expect_finite,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError

_EPSILON = 1e-12


def mixing(logits: torch.Tensor) -> torch.Tensor:
    """The shares (..., skills) of each skill from routing logits (..., skills): ``sigmoid(Z) / sum_s sigmoid(Z)``."""
    shares = logits.to(working_dtype(logits)).sigmoid()
    return shares / (shares.sum(-1, keepdim=True) + _EPSILON)


def mixed(B: torch.Tensor, A: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (..., out, rank) and (..., rank, in) of one mixture of the skills of a bank, for each head its own.

    B and A are mixed apart, so that their product has terms of the B of one skill and the A of another.

    Args:
        B: (..., heads, skills, out / heads, rank)
        A: (..., heads, skills, rank, in / heads)
        shares: (heads, skills)
    """
    wide = working_dtype(B, A)
    B = torch.einsum("qs,...qsor->...qor", shares.to(wide), B.to(wide)).flatten(-3, -2)
    return B, torch.einsum("qs,...qsri->...qri", shares.to(wide), A.to(wide)).transpose(-3, -2).flatten(-2)


@register_form
class Bank(ByFactors):
    """``gain * B_t @ A_t`` for task t, whose factors are mixtures of S skills, one in each of Q heads.

    B (..., Q, S, out / Q, rank) and A (..., Q, S, rank, in / Q); head q makes the q-th part of the outputs of B_t and reads the
    q-th part of the inputs of A_t. Z (T, Q, S) are the routing logits of T tasks. With several tasks it is no update
    until one is taken (:meth:`of`).
    """

    form = "bank"
    fields = ("B", "A", "Z")

    def __init__(
        self, B: torch.Tensor, A: torch.Tensor, Z: torch.Tensor, gain: Gain = 1.0, shared: dict[str, str] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.B, self.A, self.Z = B, A, Z
        self.gain = gain
        self.shared = shared or {}
        heads = Z.shape[1]
        self.shape = tuple(shape or (*B.shape[:-4], heads * B.shape[-2], heads * A.shape[-1]))

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        B, A, Z = (tensors[name] for name in cls.fields)
        if Z.ndim != 3 or 0 in Z.shape or A.ndim < 2:
            raise EspalierError(f"Z and A have shapes {tuple(Z.shape)} and {tuple(A.shape)}; Z must be of tasks, heads and skills")
        _, heads, skills = Z.shape
        if outputs % heads or inputs % heads:
            raise EspalierError(f"Z has {heads} heads, which do not divide a parameter of {outputs} x {inputs}")
        rank = A.shape[-2]
        expect("B", B, (*lead, heads, skills, outputs // heads, rank))
        expect("A", A, (*lead, heads, skills, rank, inputs // heads))
        return cls(B, A, expect_finite("Z", Z, Z.shape), gain, shape=shape)

    @property
    def tasks(self) -> int:
        """How many tasks it has."""
        return len(self.Z)

    def of(self, task: int) -> LowRank:
        """The update of one task, by number."""
        return LowRank(*mixed(self.B, self.A, mixing(self.Z[task])), self.gain, self.shape)

    def mean(self) -> LowRank:
        """The update of the uniform mean of the skills: of their factors, which is not the mean of their updates."""
        return LowRank(*mixed(self.B, self.A, mixing(torch.zeros_like(self.Z[0]))), self.gain, self.shape)

    def low_rank(self) -> LowRank:
        if self.tasks > 1:
            raise EspalierError(f"it is a bank of {self.tasks} tasks, each of which has an update of its own; take one of them")
        return self.of(0)
