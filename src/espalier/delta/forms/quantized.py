"""Any form with its numbers kept as codes of 1 to 8 bits, scales and means."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Self

import torch

from espalier.delta.base import BaseWeight
from espalier.delta.forms.bits import pack_bits, packed_size, unpack_bits
from espalier.delta.forms.composite import Composite, read_parts
from espalier.delta.forms.dense import Dense
from espalier.delta.forms.low_rank import LowRank
from espalier.delta.forms.update import Gain, Update, expect_finite, register_form
from espalier.errors import EspalierError, one_of
from espalier.kernels.philox import Stream

Codebook = Literal["uniform", "normal"]
_ROUNDS = 500
_SMALL = 1 << 20  # numbers that may be decoded whatever the parameter's size


class Coded(NamedTuple):
    """One tensor as codes: ``level[code] * scale + mean``, scale and mean (groups,) of runs of equal length."""

    codes: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor


def levels(codebook: Codebook, bits: int) -> torch.Tensor:
    """The ``2 ** bits`` values that codes stand for, ascending, float32.

    ``uniform``: evenly from -1 to 1. ``normal``: those of least expected absolute error under the standard normal
    (BinaryAdapter, ICCV 2023): every level is the median of what is nearest to it, found in 500 rounds.
    """
    if codebook == "uniform":
        return torch.linspace(-1, 1, 2**bits, dtype=torch.float64).float()
    upper = _normal_levels(bits)
    return torch.tensor([*(-level for level in reversed(upper)), *upper], dtype=torch.float64).float()


@functools.cache  # of numbers, not of a tensor: the first to ask may be planning, whose tensors hold none
def _normal_levels(bits: int) -> tuple[float, ...]:
    """The upper half of the ``normal`` levels; the others mirror them."""
    normal, count = NormalDist(), 2 ** (bits - 1)
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)]
    for _ in range(_ROUNDS):
        bounds = [0.5, *(normal.cdf((a + b) / 2) for a, b in itertools.pairwise(upper)), 1.0]
        upper = [normal.inv_cdf((a + b) / 2) for a, b in itertools.pairwise(bounds)]
    return tuple(upper)


def encode(values: torch.Tensor, bits: int, group: int, codebook: Codebook) -> Coded:
    """The nearest levels of a tensor.

    Args:
        values: of any shape; coded in row-major order.
        bits: of a code, 1 to 8.
        group: numbers that share a scale and a mean; 0 for all of them.
        codebook: ``normal`` scales by mean and standard deviation, ``uniform`` from the least to the greatest.
    """
    flat = values.detach().float().flatten()
    size = min(group or len(flat), len(flat)) or 1
    whole = len(flat) // size * size
    runs = [run for run in (flat[:whole].view(-1, size), flat[whole:].view(1, -1)) if run.numel()]
    table = levels(codebook, bits).to(flat.device)
    scales, means, codes = [flat[:0]], [flat[:0]], [flat[:0].to(torch.uint8)]
    for run in runs:
        z, scale, mean = _normalized(run, codebook)
        codes.append(_nearest(z, table).to(torch.uint8).flatten())
        scales.append(scale)
        means.append(mean)
    return Coded(pack_bits(torch.cat(codes), bits), torch.cat(scales), torch.cat(means))


def decode(coded: Coded, bits: int, group: int, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The numbers [start, stop) of what :func:`encode` made, flat, float32; ``table`` has the levels."""
    first = start // 8 * 8  # eight codes are whole bytes
    codes = unpack_bits(coded.codes[first * bits // 8 :], stop - first, bits)[start - first :]
    values = table[codes.int()]
    if len(coded.scale) <= 1:
        return values * coded.scale + coded.mean
    groups = range(start // group, -(-stop // group))
    scale, mean = (t[groups.start : groups.stop].repeat_interleave(group) for t in (coded.scale, coded.mean))
    skipped = start - groups.start * group
    return values * scale[skipped : skipped + len(values)] + mean[skipped : skipped + len(values)]


def small_normal(stream: Stream, *shape: int) -> torch.Tensor:
    """Normal of deviation 0.001, cut at two deviations: the start of what codes cannot have as zero (BinaryAdapter, ICCV 2023)."""
    edge = math.erf(math.sqrt(2))  # the share of a normal that lies within two deviations
    within = stream.uniform(*shape, low=-edge, high=edge)
    return 1e-3 * math.sqrt(2) * torch.erfinv(within.double()).float()


def through_codes(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What is left of a tensor by :func:`encode` with ``normal`` levels (``table``) and one scale, bit for bit, under autograd.

    The gradient goes straight through the choice of the level, ``dq / dz = 1``; mean and deviation stay in the graph
    (BinaryAdapter, ICCV 2023).
    """
    z, scale, mean = _normalized(values.float().reshape(1, -1), "normal")
    q = table[_nearest(z.detach(), table)] + (z - z.detach())
    return (q * scale + mean).reshape(values.shape)


def _normalized(runs: torch.Tensor, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs (groups, n) as multiples of a scale from a mean, and scales and means (groups,)."""
    if codebook == "normal":
        scale, mean = runs.std(-1, correction=min(1, runs.shape[-1] - 1)), runs.mean(-1)
    else:
        low, high = runs.aminmax(dim=-1)
        scale, mean = (high - low) / 2, (high + low) / 2
    # the paper divides by sd + 1e-5, which is not small beside the numbers of an adapter
    return (runs - mean[:, None]) / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], scale, mean


def _nearest(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The codes (int32) of the levels that are nearest."""
    return torch.bucketize(z, (table[1:] + table[:-1]) / 2, out_int32=True)


@register_form
class Quantized(Composite):
    """The update of another form, some of whose floating-point tensors are kept as codes (see :class:`Coded`).

    The tensor FIELD of the inner form is kept as ``FIELD.codes`` (packed bytes), ``FIELD.scale`` and
    ``FIELD.mean``; its other tensors as they are. Codes are decoded once for each object, to float32.
    """

    form = "quantized"

    def __init__(
        self, inner: Update, coded: Mapping[str, Coded], bits: int, group: int = 0, codebook: Codebook = "normal", gain: Gain = 1.0
    ) -> None:
        """``inner`` holds, for every tensor of ``coded``, one of its shape that is not looked at."""
        super().__init__({"inner": inner}, gain)
        self.coded = dict(coded)
        self.bits, self.group, self.codebook = bits, group, codebook
        self.depends_on_base, self.exact_at_one, self.ignores_base = inner.depends_on_base, inner.exact_at_one, inner.ignores_base
        names = {f"{name}.{part}": f"{inner.shared[name]}.{part}" for name in coded if name in inner.shared for part in Coded._fields}
        self.shared = {k: f for k, f in self.shared.items() if k.removeprefix("inner.") not in coded} | names

    @classmethod
    def of(cls, update: Update, bits: int, group: int = 0, codebook: Codebook = "normal", fields: Iterable[str] | None = None) -> Quantized:
        """``update`` with its floating-point tensors (or those named in ``fields``) coded: see :func:`encode`."""
        tensors = update.tensors()
        names = [n for n, t in tensors.items() if t.is_floating_point()] if fields is None else list(fields)
        coded = {name: encode(tensors[name], bits, group, codebook) for name in names}
        inner = update.with_tensors({name: _placeholder(tensors[name].shape) for name in names})
        inner.gain = 1.0
        return cls(inner, coded, bits, group, codebook, update.gain)

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {f"{name}.{part}": tensor for name, c in self.coded.items() for part, tensor in c._asdict().items()}
        return own | {n: t for n, t in super().tensors().items() if n.removeprefix("inner.") not in self.coded}

    def constants(self) -> dict[str, Any]:
        shapes = {name: list(self._inner.tensors()[name].shape) for name in self.coded}
        return {**super().constants(), "bits": self.bits, "group": self.group, "codebook": self.codebook, "shapes": shapes}

    @property
    def _inner(self) -> Update:
        return self.parts["inner"]

    @classmethod
    def from_tensors(cls, tensors, constants, shape, gain):  # type: ignore[no-untyped-def]
        bits, group, shapes = constants["bits"], constants["group"], constants["shapes"]
        one_of("bits", bits, (1, 2, 3, 4, 5, 6, 7, 8))
        one_of("codebook", constants["codebook"], ("uniform", "normal"))
        if type(group) is not int or group < 0:
            raise EspalierError(f"group is {group!r}; it must be a number of entries, or 0 for all")
        coded, meant = {}, {}
        for name, size in shapes.items():
            if not isinstance(size, list) or not all(type(n) is int and 0 <= n < 2**62 for n in size):
                raise EspalierError(f"the shape of {name!r} is {size!r}; it must be a list of sizes")
            entries = math.prod(size)
            if entries > max(math.prod(shape), _SMALL):
                raise EspalierError(f"{name} would be decoded to {entries:,} numbers; the parameter has {math.prod(shape):,}")
            c = coded[name] = Coded(*(tensors[f"{name}.{part}"] for part in Coded._fields))
            if c.codes.dtype != torch.uint8 or tuple(c.codes.shape) != (packed_size(entries, bits),):
                raise EspalierError(f"{name}.codes is {c.codes.dtype} of shape {tuple(c.codes.shape)}; it must be uint8 of shape {(packed_size(entries, bits),)}")
            groups = min(1, entries) if group == 0 else -(-entries // group)
            expect_finite(f"{name}.scale", c.scale, (groups,))
            expect_finite(f"{name}.mean", c.mean, (groups,))
            meant[f"inner.{name}"] = _placeholder(size)
        if constants["parts"]["inner"]["form"] == cls.form:
            raise EspalierError("a quantized update cannot be quantized again")
        inner = read_parts({**tensors, **meant}, constants, shape, ["inner"])["inner"]
        if stray := sorted(set(coded) - set(inner.tensors())):
            raise EspalierError(f"the form {inner.form!r} has no tensor {stray[0]!r}")
        return cls(inner, coded, bits, group, constants["codebook"], gain)

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        other = super().with_tensors({n: t for n, t in tensors.items() if n.startswith("inner.") and n.removeprefix("inner.") not in self.coded})
        other.coded = {
            name: Coded(*(tensors.get(f"{name}.{part}", tensor) for part, tensor in c._asdict().items()))
            for name, c in self.coded.items()
        }
        return other

    def _decode(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The numbers [start, stop) of a tensor, flat, float32."""
        count = self._inner.tensors()[name].numel()
        c = self.coded[name]
        return decode(c, self.bits, self.group, levels(self.codebook, self.bits).to(c.codes.device), start, count if stop is None else stop)

    @cached_property
    def _decoded(self) -> Update:
        inner = self._inner.tensors()
        return self._inner.with_tensors({name: self._decode(name).reshape(inner[name].shape) for name in self.coded})

    @property
    def inner(self) -> Update:
        """The update that is meant, decoded."""
        return self._decoded.scaled(self.gain)

    def unbind(self) -> list[Update]:
        return self.inner.unbind()

    def _slice(self, start: int, stop: int) -> Update | None:
        if isinstance(self._inner, Dense):  # the one whose numbers are many
            row = math.prod(self.shape[1:])
            values = self._decode("values", start * row, stop * row).reshape(stop - start, *self.shape[1:])
            return Dense(values, self._inner.gain).scaled(self.gain)
        return self.inner.slice_rows(start, stop)

    def low_rank(self) -> LowRank | None:
        return self.inner.low_rank()

    def materialize(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inner.materialize(weight)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inner.apply(weight)

    def matmul(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.matmul(x, onto)

    def linear(self, x: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return self.inner.linear(x, base)

    def lookup(self, ids: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        return self.inner.lookup(ids, base)


def _placeholder(shape: Iterable[int]) -> torch.Tensor:
    """A tensor of a shape, without memory."""
    return torch.empty(tuple(shape), dtype=torch.float32, device="meta")
