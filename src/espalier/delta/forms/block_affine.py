"""Block-wise linear maps of a weight: block rotations (OFT, arXiv:2306.07280) and BAT of Bone (arXiv:2409.15371)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.delta.forms.update import (
    Gain,
    Update,
    as_matrix,
    expect,
    gain_like,
    matrix_shape,
    register_form,
    working_dtype,
)
from espalier.errors import EspalierError, one_of

Side = Literal["input", "output", "row"]


@register_form
class BlockAffine(Update):
    """``W + gain * (W mapped by B)`` with blocks B (..., blocks, r, r), laid along one side of W.

    - ``input``: columns in blocks J_j of r: ``W[:, J_j] B_j``. With ``B_j = R_j - I`` it is the block rotation
      ``W blockdiag(R)`` of OFT; a butterfly (BOFT) is a chain of these and permutations.
    - ``output``: rows in blocks I_i of r: ``B_i W[I_i]``.
    - ``row``: W in r by r blocks: ``W_ij B_i + B_i``, BAT of Bone, where r divides both sizes.

    B is kept as the distance from the identity: zeros change nothing, and the update is linear in its gain.
    """

    form = "block_affine"
    depends_on_base = True
    fields = ("B",)

    def __init__(self, B: torch.Tensor, shape: tuple[int, ...], side: Side = "input", gain: Gain = 1.0) -> None:
        self.B = B
        self.shape = tuple(shape)
        self.side = side
        self.gain = gain
        self._skipped = 0  # rows of the first block that a slice is without

    def constants(self) -> dict[str, Any]:
        return {"side": self.side}

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        *lead, outputs, inputs = matrix_shape(shape)
        side, B = constants["side"], tensors["B"]
        one_of("side", side, ("input", "output", "row"))
        size, block = inputs if side == "input" else outputs, B.shape[-1] if B.ndim else 0
        if not block or size % block or (side == "row" and inputs % block):
            raise EspalierError(f"blocks of {block} do not fit a parameter of {outputs} x {inputs}")
        return cls(expect("B", B, (*lead, size // block, block, block)), shape, side, gain)

    @property
    def _block(self) -> int:
        return self.B.shape[-1]

    def _slice(self, start: int, stop: int) -> Update | None:
        if self.side == "output":
            return None
        part = self._with_rows(stop - start)
        if self.side == "row":
            first, skipped = divmod(start + self._skipped, self._block)
            part = part.with_tensors({"B": self.B[first : -(-(stop + self._skipped) // self._block)]})
            part._skipped = skipped  # type: ignore[attr-defined]
        return part

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        wide = as_matrix(weight.to(working_dtype(weight)))
        B = self.B.to(wide) * self.gain
        if self.side == "input":
            blocks = wide.unflatten(-1, (-1, self._block)).transpose(-3, -2)  # (..., blocks, out, r)
            mapped = (blocks @ B).transpose(-3, -2).flatten(-2)
        elif self.side == "output":
            mapped = (B @ wide.unflatten(-2, (-1, self._block))).flatten(-3, -2)
        else:
            rows = wide.shape[-2]
            missing = B.shape[-3] * self._block - rows - self._skipped
            whole = functional.pad(wide, (0, 0, self._skipped, missing))
            blocks = whole.unflatten(-2, (-1, self._block)).unflatten(-1, (-1, self._block))  # (..., i, r, j, r)
            mapped = (blocks.flatten(-3, -2) @ B).view(blocks.shape) + B.unsqueeze(-2)
            mapped = mapped.flatten(-2).flatten(-3, -2).narrow(-2, self._skipped, rows)
        return mapped.reshape(weight.shape)

    def _map(self, x: torch.Tensor) -> torch.Tensor:
        """``x + gain * blockdiag(B) x`` over the last dimension."""
        B = (self.B * gain_like(self.gain, self.B)).to(x.dtype)
        blocks = x.reshape(-1, *B.shape[:2])
        mapped = torch.bmm(blocks.transpose(0, 1), B.transpose(-1, -2))  # of views, so that x itself is kept for the way back, and no copy
        return (blocks + mapped.transpose(0, 1)).reshape(x.shape)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        if self.side == "input":
            return base.linear(self._map(x))
        if self.side == "output":
            return self._map(base.linear(x))
        # each block of rows maps the input in its own way: the weight is smaller than all of those inputs
        return functional.linear(x, self.apply(base.dense()).to(x.dtype), base.bias)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        rows, B = base.rows(ids), self.B.to(base.dtype)
        block, within = (ids + self._skipped) // self._block, (ids + self._skipped) % self._block
        blocks = rows.unflatten(-1, (-1, self._block)) if self.side != "output" else rows
        if self.side == "input":
            mapped = torch.einsum("...nr,nrs->...ns", blocks, B).flatten(-2)
        elif self.side == "output":
            near = base.rows(block.unsqueeze(-1) * self._block + torch.arange(self._block, device=ids.device))
            mapped = (B[block, within].unsqueeze(-2) @ near).squeeze(-2)
        else:
            mapped = (blocks @ B[block] + B[block, within].unsqueeze(-2)).flatten(-2)
        return rows + mapped * gain_like(self.gain, rows)
