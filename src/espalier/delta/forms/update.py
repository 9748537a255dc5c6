"""The contract of an update to one parameter, what the forms share, and the list of forms.

Shapes are logical. A weight of two dimensions is a matrix W (out, in); of three, fused experts (experts, out,
in), each a matrix; of four or more, a convolution (out, in, kh, kw), which matrix-like forms view as
(out, in * kh * kw), as PEFT does. (A one-dimensional convolution has three: only forms that act entry by entry
fit it.) A form's tensors carry the leading dimension of experts and ``update[e]`` is the update of expert e.
``gain`` is one 0-d tensor, or a number, that scales the update; at 0 the base is restored. A tensor, so that
changing it recompiles nothing.

``materialize`` is the law; ``linear``, ``matmul`` and ``lookup`` are accelerators for matrices that the tests
hold equal to it. Arithmetic follows the dtype of ``x`` (products) or of the weight, at least float32
(``materialize``, ``apply``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch.nn import functional

from espalier.delta.base import BaseWeight
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from espalier.delta.forms.low_rank import LowRank

Gain = torch.Tensor | float


class Update:
    """An update to one parameter: see the module's docstring for the contract."""

    form: ClassVar[str]
    """Name on disk."""
    depends_on_base: bool = False
    """Whether the update needs the base weight; such forms have no ``matmul``."""
    exact_at_one: bool = False
    """Whether a gain that is the Python number 1.0 is cheaper or more exact than a tensor that holds it."""
    ignores_base: bool = False
    """Whether nothing of the base is left in the updated weight when the gain is the Python number 1.0."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors, each an attribute; one that is ``None`` is left out."""
    shared: Mapping[str, str] = {}
    """Field -> name of the factor it shares with other parameters' updates; empty for private ones."""

    shape: tuple[int, ...]
    gain: Gain

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point tensor, else of the first tensor."""
        dtypes = [t.dtype for t in self.tensors().values()]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the private tensors; shared factors are counted once by their delta."""
        return sum(t.numel() * t.element_size() for n, t in self.tensors().items() if n not in self.shared)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that define the update, by field name; inverse of :meth:`from_tensors`."""
        return {name: tensor for name in self.fields if (tensor := getattr(self, name)) is not None}

    def constants(self) -> dict[str, Any]:
        """What else defines the update, as JSON values."""
        return {}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any], shape: tuple[int, ...], gain: Gain
    ) -> Update:
        """Rebuild an update of a weight of ``shape``; nothing is expanded.

        Raises:
            EspalierError: when the tensors' shapes, dtypes or indices do not fit ``shape``.
        """
        raise NotImplementedError

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Update:
        """The same update over other tensors of the same meaning (moved, sliced, detached): nothing is checked."""
        other = copy.copy(self)
        for name in vars(self):
            if isinstance(getattr(type(self), name, None), cached_property):
                delattr(other, name)  # it was made from the tensors
        for name, tensor in tensors.items():
            setattr(other, name, tensor)
        return other

    def equals(self, other: Update) -> bool:
        """Whether the other is the same update in the same form, bit for bit."""
        mine, their = self.tensors(), other.tensors()
        same = self.form == other.form and float(self.gain) == float(other.gain) and self.constants() == other.constants()
        return same and mine.keys() == their.keys() and all(torch.equal(mine[name], their[name]) for name in mine)

    def scaled(self, factor: Gain) -> Update:
        """The same update with ``factor`` times its gain."""
        other = self.with_tensors({})
        other.gain = self.gain * factor
        return other

    def unbind(self) -> list[Update]:
        """The updates of all leading indices: one autograd node per tensor, however many experts there are."""
        parts = {name: tensor.unbind(0) for name, tensor in self.tensors().items()}
        experts = [self.with_tensors({n: t[e] for n, t in parts.items()}) for e in range(self.shape[0])]
        for expert in experts:
            expert.shape = self.shape[1:]
        return experts

    def __getitem__(self, expert: int) -> Update:
        """The update of one leading index."""
        return self.unbind()[expert]

    def slice_rows(self, start: int, stop: int) -> Update | None:
        """The update of ``W[start:stop]``, cheaply, so that a weight is updated in slices.

        Rows are those of the first dimension. Experts are sliced one by one: for a weight of three dimensions
        this is ``None``, and :meth:`unbind` comes first.

        Args:
            start: first row, from 0.
            stop: row after the last, at most ``shape[0]``.

        Returns:
            ``None`` where rows of the updated weight need other rows of the base; which rows are asked for does not
            change that.
        """
        return None if len(self.shape) == 3 else self._slice(start, stop)

    def _slice(self, start: int, stop: int) -> Update | None:
        return None

    def _with_rows(self, count: int, **tensors: torch.Tensor) -> Update:
        """The same update of ``count`` rows, with other tensors."""
        other = self.with_tensors(tensors)
        other.shape = (count, *self.shape[1:])
        return other

    def low_rank(self) -> LowRank | None:
        """The same update as two factors, exactly, or ``None`` where the form is not made of such."""
        return None

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense update, of the weight's logical shape, in float32 (float64 for a float64 weight)."""
        raise NotImplementedError

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The updated weight, rounded once, in the weight's dtype."""
        return (weight.to(working_dtype(weight)) + self.materialize(weight)).to(weight.dtype)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ update.T`` without building the update, added to ``onto`` when given (in x's dtype)."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        """``x @ W_new.T`` given the base; forms that depend on it override this and call ``base.linear`` once."""
        return self.matmul(x, base.linear(x))

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        """Rows ``W_new[ids]`` of an embedding."""
        return functional.embedding(ids, self.apply(base.dense()))


FORMS: dict[str, type[Update]] = {}
Form = TypeVar("Form", bound=type[Update])


def register_form(cls: Form) -> Form:
    """Make a form known to the delta reader under its ``form`` name; a class decorator."""
    FORMS[cls.form] = cls
    return cls


def form(name: str) -> type[Update]:
    """The form called ``name``.

    Raises:
        EspalierError: when this version knows no such form.
    """
    if name not in FORMS:
        raise EspalierError(f"unknown form {name!r}; this version knows: {', '.join(sorted(FORMS))}")
    return FORMS[name]


# shapes and arithmetic that forms share


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Float64 when any of them is, else float32: the dtype in which updates are materialised."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as matrix-like forms see it: (..., out, in), a convolution as (out, in * kh * kw).

    Raises:
        EspalierError: when it has fewer than two dimensions.
    """
    if len(shape) < 2:
        raise EspalierError(f"the parameter's shape is {tuple(shape)}; the form needs a matrix")
    return tuple(shape) if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A weight as matrix-like forms see it: see :func:`matrix_shape`."""
    return weight.flatten(1) if weight.ndim > 3 else weight


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Tokens (..., features) as a matrix (tokens, features)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: there may be no features


def gain_like(gain: Gain, like: torch.Tensor) -> Gain:
    """A gain that multiplies ``like`` without changing its dtype."""
    return gain.to(like.dtype) if isinstance(gain, torch.Tensor) else gain


def is_one(gain: Gain) -> bool:
    """Whether a gain is the Python number 1.0, which no tensor can stand for without a look at its value."""
    return isinstance(gain, float) and gain == 1.0


def interpolate(old: torch.Tensor, new: torch.Tensor, gain: Gain) -> torch.Tensor:
    """``old + gain * (new - old)``, exact at both ends."""
    if is_one(gain):
        return new
    return torch.lerp(old, new, (gain if isinstance(gain, torch.Tensor) else torch.tensor(gain)).to(old))


def sets_integers(gain: Gain, dtype: torch.dtype) -> bool:
    """Whether a weight that is not floating point is set (a gain of 1) or left as it is (0).

    Raises:
        EspalierError: for any other gain.
    """
    if float(gain) not in (0.0, 1.0):
        raise EspalierError(f"the gain is {float(gain)}; a weight of {dtype} can only be set, with a gain of 1, or left, with 0")
    return float(gain) == 1.0


def embedding_rows(ids: torch.Tensor, table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows ``table[ids]`` in the dtype of ``like``."""
    return functional.embedding(ids, table).to(like.dtype)


def linear_onto(x: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T`` added to ``onto`` in one pass over it."""
    if onto is None:
        return functional.linear(x, weight)
    return torch.addmm(as_rows(onto), as_rows(x), weight.t()).reshape(onto.shape)


# checks of what comes from a file


def expect_shape(what: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Refuse a tensor of another shape.

    Raises:
        EspalierError: naming both shapes.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise EspalierError(f"{what} has shape {tuple(tensor.shape)}; the parameter needs {tuple(shape)}")
    return tensor


def expect(what: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Refuse a tensor of another shape, or one of integers or of 8-bit numbers, which no arithmetic takes.

    Raises:
        EspalierError: naming shape or dtype.
    """
    expect_shape(what, tensor, shape)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise EspalierError(f"{what} is {tensor.dtype}; it must be floating point of 16 bits or more")
    return tensor


def expect_finite(what: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Refuse scales of another shape, of integers, or that are not all finite (those of a meta tensor are not seen).

    Raises:
        EspalierError: naming what is wrong.
    """
    expect(what, tensor, shape)
    if not tensor.is_meta and not bool(tensor.float().isfinite().all()):
        raise EspalierError(f"{what} is not finite everywhere")
    return tensor


def expect_indices(what: str, index: torch.Tensor, lead: Sequence[int], count: int, things: str) -> torch.Tensor:
    """Refuse what are not indices of shape (*lead, any number) that lie in ``range(count)``.

    Raises:
        EspalierError: naming dtype, shape or the range seen.
    """
    if index.dtype not in (torch.int32, torch.int64) or index.ndim != len(lead) + 1 or index.shape[:-1] != tuple(lead):
        raise EspalierError(f"{what} is {index.dtype} of shape {tuple(index.shape)}; it must be int32 or int64, ({', '.join(map(str, (*lead, '...')))})")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise EspalierError(f"{what} reaches from {int(index.min())} to {int(index.max())}; there are {count} {things}")
    return index


def expect_distinct(what: str, index: torch.Tensor, thing: str) -> torch.Tensor:
    """Refuse indices of which two in the last dimension are equal.

    Raises:
        EspalierError: saying what is named twice.
    """
    if bool((index.sort(-1).values.diff(dim=-1) == 0).any()):
        raise EspalierError(f"{what} names a {thing} twice")
    return index
