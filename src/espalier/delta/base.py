"""The base: what an update is applied to, whichever way its numbers are kept.

A ``BaseWeight`` answers ``linear(x)`` (the product ``x @ W.T``, bias excluded), ``dense()`` (the logical
weight) and carries ``shape``, ``dtype`` and ``bias``. Shapes are logical: ``(..., out, in)`` with any
leading dimensions (experts), whatever the layer stores. No method and no loop knows which kind it holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from espalier.delta.forms import Update


class BaseWeight:
    """The read-only weight under an update; ``bias`` is ``None`` or of shape (out,)."""

    shape: torch.Size
    dtype: torch.dtype
    bias: torch.Tensor | None

    @property
    def trains(self) -> bool:
        """Whether a gradient may be asked of what it is made of: then its numbers are no constants to an update on it."""
        return False

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T`` for x of shape (..., in), plus ``bias`` when there is one."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        """The logical weight, (..., out, in), in its own dtype."""
        raise NotImplementedError

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``W[ids]`` of an embedding, ids of any shape."""
        return functional.embedding(ids, self.dense())

    def without_bias(self) -> BaseWeight:
        """The same weight with no bias."""
        raise NotImplementedError


class DenseBase(BaseWeight):
    """A weight that is a plain tensor, stored as (out, in) or, when ``transposed``, as (in, out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, transposed: bool = False) -> None:
        self.stored = weight
        self.transposed = transposed
        self.bias = bias
        self.dtype = weight.dtype

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.dense().shape

    @property
    def trains(self) -> bool:
        return self.stored.requires_grad

    def dense(self) -> torch.Tensor:
        return self.stored.transpose(-1, -2) if self.transposed else self.stored

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.dense(), self.bias)

    def without_bias(self) -> BaseWeight:
        return DenseBase(self.stored, None, self.transposed)


class UpdatedBase(BaseWeight):
    """A base with an update on it: what the next update of a chain stands on."""

    def __init__(self, base: BaseWeight, update: Update) -> None:
        self.base = base
        self.update = update
        self.bias = base.bias
        self.shape = base.shape
        self.dtype = base.dtype

    @property
    def trains(self) -> bool:
        numbers = (*self.update.tensors().values(), self.update.gain)
        return self.base.trains or any(isinstance(t, torch.Tensor) and t.requires_grad for t in numbers)

    def dense(self) -> torch.Tensor:
        return self.update.apply(self.base.dense())

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.base, self.update)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.update.lookup(ids, self.base)

    def without_bias(self) -> BaseWeight:
        return UpdatedBase(self.base.without_bias(), self.update)


def product(x: torch.Tensor, base: BaseWeight, update: Update) -> torch.Tensor:
    """The product of ``x`` with the updated weight, plus the base's bias.

    An update that depends on the base sees it without its bias (DoRA must not scale a bias); any other
    leaves the bias to the base's own fused product.
    """
    if update.depends_on_base and base.bias is not None:
        return update.linear(x, base.without_bias()) + base.bias
    return update.linear(x, base)
