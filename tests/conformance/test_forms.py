"""Every registered form, on every route, against its equation in float64: no line here is about one form but its entry.

``ENTRIES`` has at least one way to make each form: its tensors, its constants, and the updated weight that they
mean at a gain of 1, written out in float64 as plainly as it can be. Errors of products are measured against
float64 and may be at most 4 times those of the plain dense product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch.nn import functional

from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach_updates, detach
from espalier.delta import store
from espalier.delta.base import DenseBase, product
from espalier.delta.forms import (
    FORMS,
    Chain,
    LowRank,
    Quantized,
    RandomBases,
    Seeded,
    SeededLowRank,
    Subspace,
    Sum,
    Update,
    compact,
    form,
)
from espalier.delta.forms.bits import count_bits, pack_bits, packed_size, slice_bits, unpack_bits
from espalier.delta.forms.quantized import levels
from espalier.errors import EspalierError
from espalier.kernels.philox import GAUSSIAN, Stream
from espalier.kernels.seeded import SeededMatrix

Tensors = dict[str, torch.Tensor]
Equation = Callable[[torch.Tensor], torch.Tensor]
Made = tuple[Tensors, dict[str, Any], Equation]
Maker = Callable[["Numbers", tuple[int, ...]], Made]
REFUSED_BY_THE_READER = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)


class Numbers:
    """Random tensors of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.seed, self.dtype = seed, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def positive(self, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) + 0.5).to(self.dtype)

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator)

    def pick(self, *options: Any) -> Any:
        """One of some options, the same for every expert of a weight."""
        return options[self.seed % len(options)]

    def divisor(self, *sizes: int) -> int:
        common = math.gcd(*sizes)
        return self.pick(*[d for d in range(1, common + 1) if common % d == 0])


def wide(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def matrices(make: Callable[[Numbers, int, int], Made]) -> Maker:
    """A maker for whole weights (experts, convolutions) from one for matrices."""

    def whole(n: Numbers, shape: tuple[int, ...]) -> Made:
        if len(shape) != 3:
            tensors, constants, equation = make(n, shape[0], math.prod(shape[1:]))
            return tensors, constants, lambda weight: equation(weight.flatten(1)).reshape(weight.shape)
        experts = [make(n, *shape[1:]) for _ in range(shape[0])]
        tensors = {name: torch.stack([e[0][name] for e in experts]) for name in experts[0][0]}
        return tensors, experts[0][1], lambda weight: torch.stack([e[2](w) for e, w in zip(experts, weight, strict=True)])

    return whole


def additive(tensors: Tensors, dense: Callable[..., torch.Tensor], **constants: Any) -> Made:
    """An entry whose update is ``dense`` of its tensors."""
    return tensors, constants, lambda weight: weight + dense(**wide(tensors))


def dense(n: Numbers, shape: tuple[int, ...]) -> Made:
    return additive({"values": n.floats(*shape)}, lambda values: values)


def replace(n: Numbers, shape: tuple[int, ...]) -> Made:
    tensors = {"values": n.floats(*shape)}
    return tensors, {}, lambda weight: tensors["values"].double()


def support(n: Numbers, shape: tuple[int, ...], spelling: str) -> tuple[torch.Tensor, Tensors]:
    entries = math.prod(shape)
    positions = n.permutation(entries)[: n.pick(0, 1, entries // 3, entries)].sort().values
    if spelling == "mask":
        touched = torch.zeros(entries, dtype=torch.bool)
        touched[positions] = True
        return positions, {"mask": pack_bits(touched)}
    return positions, {"index": positions.to(n.pick(torch.int32, torch.int64))}


def at_support(is_set: bool, spelling: str) -> Maker:
    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        positions, where = support(n, shape, spelling)
        values = n.floats(len(positions))

        def equation(weight: torch.Tensor) -> torch.Tensor:
            new = weight.flatten().clone()
            for at, value in zip(positions.tolist(), values.double().tolist(), strict=True):
                new[at] = value if is_set else new[at] + value
            return new.reshape(weight.shape)

        return {"values": values, **where}, {}, equation

    return make


@matrices
def low_rank(n: Numbers, outputs: int, inputs: int) -> Made:
    rank = n.pick(1, 3, 4)
    return additive({"B": n.floats(outputs, rank), "A": n.floats(rank, inputs) / 2}, lambda A, B: torch.einsum("or,ri->oi", B, A))


def made(sparse: bool) -> Maker:
    """The weight itself, of factors and, perhaps, entries of its own."""

    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
        rank = n.pick(1, 3, 4)
        tensors = {"B": n.floats(*lead, outputs, rank), "A": n.floats(*lead, rank, inputs) / 2}
        dense = 0.5 * torch.einsum("...or,...ri->...oi", tensors["B"].double(), tensors["A"].double()).reshape(shape)
        if sparse:
            positions, where = support(n, shape, "index")
            tensors |= {"values": n.floats(len(positions)), **where}
            for at, value in zip(positions.tolist(), tensors["values"].double().tolist(), strict=True):
                dense.view(-1)[at] += value
        return tensors, {"scale": 0.5}, lambda weight: dense

    return make


@matrices
def masked_low_rank(n: Numbers, outputs: int, inputs: int) -> Made:
    kept = torch.rand(outputs * inputs, generator=n.generator) < n.pick(0.0, 0.5, 1.0)
    rank = n.pick(1, 3, 4)
    tensors = {"B": n.floats(outputs, rank), "A": n.floats(rank, inputs) / 2, "mask": pack_bits(kept)}
    return additive(tensors, lambda B, A, mask: torch.einsum("or,ri->oi", B, A) * kept.reshape(outputs, inputs))


@matrices
def scaled_low_rank(n: Numbers, outputs: int, inputs: int) -> Made:
    rank = n.pick(1, 3, 4)
    tensors = {"B": n.floats(outputs, rank), "A": n.floats(rank, inputs) / 2}
    exact = wide(tensors)
    return tensors, {}, lambda weight: weight * torch.einsum("or,ri->oi", exact["B"], exact["A"])


def pooled(n: Numbers, shape: tuple[int, ...]) -> Made:
    *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    shards, rank = n.divisor(outputs, inputs), 3
    tensors = {"B": n.floats(20, outputs // shards), "A": n.floats(23, inputs // shards) / 2}
    for name, count in (("B", 20), ("A", 23)):
        tensors[f"index_{name}"] = torch.randint(0, count, (*lead, rank, shards), generator=n.generator, dtype=torch.int32)

    def update(A: torch.Tensor, B: torch.Tensor, index_A: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
        rows = [torch.stack([torch.cat([pool[s] for s in row]) for row in index.reshape(-1, shards)]) for pool, index in ((A, index_A), (B, index_B))]
        experts = [rows[1][e : e + rank].T @ rows[0][e : e + rank] for e in range(0, len(rows[0]), rank)]
        return torch.stack(experts).reshape(shape)

    return additive(tensors, update)


def bank(n: Numbers, shape: tuple[int, ...]) -> Made:
    """Of one task, as which it is an update."""
    *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    heads, skills, rank = n.divisor(outputs, inputs), 3, 2
    tensors = {
        "B": n.floats(*lead, heads, skills, outputs // heads, rank), "A": n.floats(*lead, heads, skills, rank, inputs // heads) / 2,
        "Z": n.floats(1, heads, skills),
    }  # fmt: skip

    def update(B: torch.Tensor, A: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
        found = []
        for b, a in zip(B.reshape(-1, *B.shape[-4:]), A.reshape(-1, *A.shape[-4:]), strict=True):
            shares = [1 / (1 + torch.exp(-Z[0, q])) for q in range(heads)]
            left = [sum(w / s.sum() * one for w, one in zip(s, b[q], strict=True)) for q, s in enumerate(shares)]
            right = [sum(w / s.sum() * one for w, one in zip(s, a[q], strict=True)) for q, s in enumerate(shares)]
            found.append(torch.cat(left) @ torch.cat(right, 1))
        return torch.stack(found).reshape(shape)

    return additive(tensors, update)


@matrices
def columns(n: Numbers, outputs: int, inputs: int) -> Made:
    index = n.permutation(inputs)[: n.pick(1, inputs // 2, inputs)]

    def update(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return sum((torch.outer(v, functional.one_hot(i, inputs).double()) for v, i in zip(values.T, index, strict=True)), torch.zeros(outputs, inputs).double())

    return additive({"values": n.floats(outputs, len(index)), "index": index}, update)


@matrices
def rows(n: Numbers, outputs: int, inputs: int) -> Made:
    index = n.permutation(outputs)[: n.pick(1, outputs // 2, outputs)]

    def update(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return sum((torch.outer(functional.one_hot(i, outputs).double(), v) for v, i in zip(values, index, strict=True)), torch.zeros(outputs, inputs).double())

    return additive({"values": n.floats(len(index), inputs), "index": index}, update)


@matrices
def kronecker(n: Numbers, outputs: int, inputs: int) -> Made:
    a1, a2, terms = n.divisor(outputs), n.divisor(inputs), n.pick(1, 2, 3)
    tensors = {"A": n.floats(terms, a1, a2), "B": n.floats(terms, outputs // a1, inputs // a2) / terms}
    return additive(tensors, lambda A, B: sum(torch.kron(a, b) for a, b in zip(A, B, strict=True)))


@matrices
def kronecker_of_products(n: Numbers, outputs: int, inputs: int) -> Made:
    a1, a2 = n.divisor(outputs), n.divisor(inputs)
    tensors = {"A": n.floats(1, a1, 2), "A_in": n.floats(1, 2, a2), "B": n.floats(1, outputs // a1, 1), "B_in": n.floats(1, 1, inputs // a2)}
    return additive(tensors, lambda A, A_in, B, B_in: torch.kron((A @ A_in)[0], (B @ B_in)[0]))


def tucker(n: Numbers, shape: tuple[int, ...]) -> Made:
    ranks = [n.pick(1, min(2, d), d) for d in shape]
    tensors = {"core": n.floats(*ranks) / 2, **{f"factor_{i}": n.floats(d, r) for i, (d, r) in enumerate(zip(shape, ranks, strict=True))}}
    letters, summed = "abcd"[: len(shape)], "rstu"[: len(shape)]
    equation = ",".join([summed, *map("".join, zip(letters, summed, strict=True))]) + "->" + letters
    return additive(tensors, lambda core, **factors: torch.einsum(equation, core, *factors.values()))


@matrices
def singular_scale(n: Numbers, outputs: int, inputs: int) -> Made:
    r = n.pick(1, 2, min(outputs, inputs))
    return additive({"U": n.floats(outputs, r), "s": n.floats(r), "V": n.floats(r, inputs) / 2}, lambda U, s, V: U @ torch.diag(s) @ V)


@matrices
def output_map(n: Numbers, outputs: int, inputs: int) -> Made:
    r = n.pick(1, 2, 3)
    tensors = {"B": n.floats(outputs, r), "A": n.floats(r, outputs) / 3}
    return tensors, {}, lambda weight: weight + tensors["B"].double() @ tensors["A"].double() @ weight


@matrices
def tiled(n: Numbers, outputs: int, inputs: int) -> Made:
    """A block of any size, and one that a side does not divide."""
    b1, b2 = n.pick(outputs, 1, -(-outputs // 2)), n.pick(1, -(-inputs // 2), -(-inputs // 3), inputs)
    return additive({"values": n.floats(b1, b2)}, lambda values: torch.stack([torch.stack([values[i % b1, j % b2] for j in range(inputs)]) for i in range(outputs)]))


@matrices
def hadamard(n: Numbers, outputs: int, inputs: int) -> Made:
    rank = n.pick(1, 2, 3)
    tensors = {"B1": n.floats(outputs, rank), "A1": n.floats(rank, inputs) / 2, "B2": n.floats(outputs, rank), "A2": n.floats(rank, inputs) / 2}
    return additive(tensors, lambda B1, A1, B2, A2: torch.einsum("or,ri,os,si->oi", B1, A1, B2, A2))


def block_affine(side: str) -> Maker:
    @matrices
    def make(n: Numbers, outputs: int, inputs: int) -> Made:
        r = n.divisor(*{"input": (inputs,), "output": (outputs,), "row": (outputs, inputs)}[side])
        B = n.floats((inputs if side == "input" else outputs) // r, r, r) / 3

        def equation(weight: torch.Tensor) -> torch.Tensor:
            if side == "input":
                return weight @ (torch.eye(inputs) + torch.block_diag(*B.double()))
            if side == "output":
                return (torch.eye(outputs) + torch.block_diag(*B.double())) @ weight
            blocks = [[w @ (torch.eye(r) + b) + b for w in row.split(r, 1)] for row, b in zip(weight.split(r), B.double(), strict=True)]
            return torch.cat([torch.cat(row, 1) for row in blocks])

        return {"B": B}, {"side": side}, equation

    return make


def diagonal(*sides: str) -> Maker:
    @matrices
    def make(n: Numbers, outputs: int, inputs: int) -> Made:
        tensors = {side: n.floats(outputs if side == "rows" else inputs) for side in sides}
        one = {"rows": torch.ones(outputs), "columns": torch.ones(inputs)} | wide(tensors)
        return tensors, {}, lambda weight: torch.diag(one["rows"]).double() @ weight @ torch.diag(one["columns"]).double()

    return make


def permute(*sides: str) -> Maker:
    @matrices
    def make(n: Numbers, outputs: int, inputs: int) -> Made:
        tensors = {side: n.permutation(outputs if side == "rows" else inputs) for side in sides}
        order = {"rows": range(outputs), "columns": range(inputs)} | {k: t.tolist() for k, t in tensors.items()}
        return tensors, {}, lambda weight: torch.stack([torch.stack([weight[i, j] for j in order["columns"]]) for i in order["rows"]])

    return make


def ternary(per_row: bool) -> Maker:
    def matrix(n: Numbers, *shape: int) -> Made:
        signs = torch.randint(-1, 2, shape, generator=n.generator)
        scale = n.positive(*shape[:1] if per_row else ())
        tensors = {"positive": pack_bits(signs.flatten() == 1), "negative": pack_bits(signs.flatten() == -1), "scale": scale}
        scales = scale.double().reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
        return tensors, {}, lambda weight: weight + signs * scales

    return lambda n, shape: matrices(matrix)(n, shape) if len(shape) > 1 else matrix(n, *shape)


def part(made: Made, name: str, gain: float = 1.0) -> dict[str, Any]:
    return {"form": name.split()[0], "gain": gain, "constants": made[1]}


def magnitude(inner: str) -> Maker:
    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        made = ENTRIES[inner](n, shape)
        lead = shape[:-1] if len(shape) <= 3 else shape[:1]
        size = n.positive(*lead)

        def equation(weight: torch.Tensor) -> torch.Tensor:
            direction = weight + 1.5 * (made[2](weight) - weight)
            flat = direction if len(shape) <= 3 else direction.flatten(1)
            return (size.double()[..., None] * flat / flat.norm(dim=-1, keepdim=True)).reshape(weight.shape)

        return {"magnitude": size, **{f"inner.{k}": t for k, t in made[0].items()}}, {"parts": {"inner": part(made, inner, 1.5)}}, equation

    return make


def combined(*names: str, in_order: bool) -> Maker:
    """Several other entries, each with a gain of 0.75: added, or one after the other."""

    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        parts = [ENTRIES[name](n, shape) for name in names]
        tensors = {f"{i}.{key}": t for i, made in enumerate(parts) for key, t in made[0].items()}
        constants = {"parts": {str(i): part(made, name, 0.75) for i, (made, name) in enumerate(zip(parts, names, strict=True))}}

        def equation(weight: torch.Tensor) -> torch.Tensor:
            new = weight
            for _, _, one in parts:
                base = new if in_order else weight
                new = new + 0.75 * (one(base) - base)
            return new

        return tensors, constants, equation

    return make


def blocks(*names: str) -> Maker:
    """Other entries on the upper and the lower rows, of every other expert, with a row between that stays."""

    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        experts, outputs = shape[:2] if len(shape) == 3 else (1, shape[0])
        half, rest = -(-outputs // 2), shape[2:] if len(shape) == 3 else shape[1:]
        within = [(0, half), (half + 1, outputs)][: 1 + (half + 1 < outputs)]
        rows = [(e * outputs + start, e * outputs + stop) for e in range(0, experts, 2) for start, stop in within]
        kinds = [names[i % len(names)] for i in range(len(rows))]
        parts = [ENTRIES[name](n, (stop - start, *rest)) for name, (start, stop) in zip(kinds, rows, strict=True)]
        tensors = {f"{i}.{key}": t for i, made in enumerate(parts) for key, t in made[0].items()}
        constants = {"rows": rows, "parts": {str(i): part(made, name, 0.75) for i, (made, name) in enumerate(zip(parts, kinds, strict=True))}}

        def equation(weight: torch.Tensor) -> torch.Tensor:
            new = weight.reshape(experts * outputs, *rest).clone()
            for (start, stop), (_, _, one) in zip(rows, parts, strict=True):
                new[start:stop] += 0.75 * (one(new[start:stop]) - new[start:stop])
            return new.reshape(weight.shape)

        return tensors, constants, equation

    return make


def quantized(inner: str, bits: int, group: int, codebook: Any) -> Maker:
    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        tensors, constants, _ = ENTRIES[inner](n, shape)
        plain = form(inner.split()[0]).from_tensors(tensors, constants, shape, 1.0)
        update = Quantized.of(plain, bits, group, codebook)
        decoded = dict(tensors)
        for name, coded in update.coded.items():
            stream = int.from_bytes(bytes(coded.codes.tolist()), "little")
            codes = [stream >> (i * bits) & (2**bits - 1) for i in range(tensors[name].numel())]
            runs = [(i // group if group else 0) for i in range(len(codes))]
            values = [levels(codebook, bits)[c] * coded.scale[g] + coded.mean[g] for c, g in zip(codes, runs, strict=True)]
            decoded[name] = (torch.stack(values) if values else torch.empty(0)).reshape(tensors[name].shape)
        exact = form(inner.split()[0]).from_tensors(wide(decoded), constants, shape, 1.0)
        return update.tensors(), update.constants(), lambda weight: weight + exact.materialize(weight)

    return make


def golomb(n: Numbers, shape: tuple[int, ...]) -> Made:
    signs = torch.randint(-1, 2, (math.prod(shape),), generator=n.generator) * (torch.rand(math.prod(shape), generator=n.generator) < n.pick(0.1, 0.5, 1.0))
    positions, b, scale = signs.nonzero().flatten().tolist(), n.pick(0, 1, 3), n.positive()
    gaps = [at - before - 1 for before, at in zip([-1, *positions], positions, strict=False)]
    bits = [int(signs[at] < 0) for at in positions] + [gap >> j & 1 for j in range(b) for gap in gaps]
    for gap in gaps:
        bits += [1] * (gap >> b) + [0]
    code = pack_bits(torch.tensor(bits + [1] * (-len(bits) % 8), dtype=torch.uint8))
    update = signs.double().reshape(shape) * scale.double()
    return {"code": code, "scale": scale}, {"count": len(positions), "parameter": b}, lambda weight: weight + update


def factored(B: str, A: str, start: bool) -> Maker:
    """Factors that are the updates of other entries, of the matrices (out, rank) and (rank, in), A perhaps on a start."""

    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
        rank = n.pick(1, min(3, outputs, inputs))
        made = {"B": ENTRIES[B](n, (*lead, outputs, rank)), "A": ENTRIES[A](n, (*lead, rank, inputs))}
        tensors = {f"{name}.{key}": t for name, one in made.items() for key, t in one[0].items()}
        constants = {
            "parts": {name: part(one, kind, 0.5) for (name, one), kind in zip(made.items(), (B, A), strict=True)},
            "rank": rank,
            "start": {"seed": n.seed, "name": "x"} if start else None,
        }
        A0 = Stream(n.seed, "x").kaiming_uniform(*lead, rank, inputs).double() * start
        zero_B, zero_A = torch.zeros(*lead, outputs, rank).double(), torch.zeros(*lead, rank, inputs).double()
        dense = (0.5 * made["B"][2](zero_B)) @ (A0 + 0.5 * made["A"][2](zero_A))
        return tensors, constants, lambda weight: weight + dense.reshape(shape)

    return make


def basis(n: Numbers, name: str, rows: int, columns: int) -> tuple[SeededMatrix, torch.Tensor]:
    """A seeded matrix, and its numbers as the stream draws them."""
    place = Stream(n.seed, name, 3)
    return SeededMatrix.of(place, rows, columns, GAUSSIAN, 0.5), Stream(n.seed, name, 3).gaussian(rows, columns).double() / 2


def seeded(n: Numbers, shape: tuple[int, ...]) -> Made:
    coefficients = n.floats(3)
    matrix, numbers = basis(n, "basis", math.prod(shape), 3)
    constants = Seeded(coefficients, matrix, shape).constants()
    return {"coefficients": coefficients}, constants, lambda weight: weight + (numbers @ coefficients.double()).reshape(shape)


def seeded_low_rank(n: Numbers, shape: tuple[int, ...]) -> Made:
    """B frozen, A a combination of two bases, and a vector for each: VeRA and NOLA at once."""
    *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    rank = n.pick(1, 2, min(outputs, inputs)) if min(outputs, inputs) > 1 else 1
    (B, B_numbers), (A, A_numbers) = basis(n, "B", math.prod(lead) * outputs, rank), basis(n, "A", math.prod(lead) * rank * inputs, 2)
    tensors = {"coefficients_A": n.floats(*lead, 2), "b": n.floats(*lead, outputs), "d": n.floats(*lead, rank)}
    constants = SeededLowRank(shape, rank, {"B": B, "A": A}, tensors).constants()

    def update(coefficients_A: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        left = b[..., None] * B_numbers.reshape(*lead, outputs, rank)
        right = d[..., None] * torch.einsum("...ric,...c->...ri", A_numbers.reshape(*lead, rank, inputs, 2), coefficients_A)
        return (left @ right).reshape(shape)

    return tensors, constants, additive(tensors, update)[2]


def frozen_low_rank(n: Numbers, shape: tuple[int, ...]) -> Made:
    """B and A frozen, the same for all experts: VeRA."""
    *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    rank = n.pick(1, min(2, outputs, inputs))
    (B, B_numbers), (A, A_numbers) = basis(n, "B", outputs, rank), basis(n, "A", rank, inputs)
    tensors = {"b": n.floats(*lead, outputs), "d": n.floats(*lead, rank)}
    constants = SeededLowRank(shape, rank, {"B": B, "A": A}, tensors).constants()

    def update(b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return (b[..., None] * B_numbers * d[..., None, :] @ A_numbers).reshape(shape)

    return tensors, constants, additive(tensors, update)[2]


def random_bases(seeds: bool) -> Maker:
    """Bases of which there are enough for full rank, or one fewer."""

    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
        large, small = max(outputs, inputs), min(outputs, inputs)
        rank = n.pick(1, min(2, small), small)
        count = max(1, -(-small // rank) - n.pick(0, 1))
        tensors = {"lam": n.floats(*lead, count, rank), "gamma": n.floats(*lead, count, small)}
        (B, B_numbers), (A, A_numbers) = basis(n, "B", large, count * rank), basis(n, "A", rank, small)
        constants = RandomBases(tensors, {"B": B, "A": A} if seeds else {}, shape).constants()
        if not seeds:
            tensors |= {"B": n.floats(large, count * rank), "A": n.floats(rank, small)}

        def update(lam: torch.Tensor, gamma: torch.Tensor, B: torch.Tensor = B_numbers, A: torch.Tensor = A_numbers) -> torch.Tensor:
            terms = [B[:, k * rank : (k + 1) * rank] @ (lam[..., k, :, None] * A * gamma[..., k, None, :]) for k in range(count)]
            total = torch.stack(terms).sum(0)
            return (total if outputs >= inputs else total.mT).reshape(shape)

        return tensors, constants, additive(tensors, update)[2]

    return make


def subspace(projection: str, structure: bool) -> Maker:
    """The matrix of the projection is what it makes of unit vectors."""

    def make(n: Numbers, shape: tuple[int, ...]) -> Made:
        tensors = {"z": n.floats(3), **({"lam": n.floats(1)} if structure else {})}
        entries = math.prod(shape)
        update = Subspace(
            tensors["z"], Stream(n.seed, "x"), projection, shape, scale=0.5, nonzeros=2 * entries if projection == "sparse" else 0,
        )  # fmt: skip
        P = torch.stack([update.with_tensors({"z": unit}).materialize(torch.zeros(shape).double()) for unit in torch.eye(3).double()], -1)
        return tensors, update.constants(), additive(tensors, lambda z, lam=1.0: P @ (z * lam))[2]

    return make


ENTRIES: dict[str, Maker] = {
    "dense": dense,
    "replace": replace,
    "replace at an index": at_support(True, "index"),
    "replace at a mask": at_support(True, "mask"),
    "low_rank": low_rank,
    "made": made(sparse=False),
    "made of factors and entries": made(sparse=True),
    "masked_low_rank": masked_low_rank,
    "scaled_low_rank": scaled_low_rank,
    "pooled": pooled,
    "bank": bank,
    "columns": columns,
    "rows": rows,
    "sparse at an index": at_support(False, "index"),
    "sparse at a mask": at_support(False, "mask"),
    "tucker": tucker,
    "singular_scale": singular_scale,
    "output_map": output_map,
    "kronecker": kronecker,
    "kronecker of products": kronecker_of_products,
    "tiled": tiled,
    "hadamard": hadamard,
    "block_affine input": block_affine("input"),
    "block_affine output": block_affine("output"),
    "block_affine row": block_affine("row"),
    "diagonal rows": diagonal("rows"),
    "diagonal columns": diagonal("columns"),
    "diagonal both": diagonal("rows", "columns"),
    "permute rows": permute("rows"),
    "permute columns": permute("columns"),
    "permute both": permute("rows", "columns"),
    "ternary": ternary(False),
    "ternary per row": ternary(True),
    "golomb": golomb,
    "seeded": seeded,
    "seeded_low_rank": seeded_low_rank,
    "seeded_low_rank of one basis": frozen_low_rank,
    "random_bases": random_bases(seeds=True),
    "random_bases of tensors": random_bases(seeds=False),
    "subspace dense": subspace("dense", structure=False),
    "subspace sparse": subspace("sparse", structure=True),
    "subspace fastfood": subspace("fastfood", structure=True),
    "magnitude of low_rank": magnitude("low_rank"),
    "magnitude of sparse": magnitude("sparse at an index"),
    "magnitude of columns": magnitude("columns"),
    "magnitude of pooled": magnitude("pooled"),
    "sum of low_rank and sparse": combined("low_rank", "sparse at a mask", in_order=False),
    "sum of rows, columns and kronecker": combined("rows", "columns", "kronecker", in_order=False),
    "chain of permute and block_affine": combined("permute columns", "block_affine input", in_order=True),
    "chain of output_map and low_rank": combined("output_map", "low_rank", in_order=True),
    "chain of low_rank and diagonal": combined("low_rank", "diagonal rows", in_order=True),
    "blocks of low_rank and replace": blocks("low_rank", "replace"),
    "blocks of sparse and diagonal": blocks("sparse at an index", "diagonal rows"),
    "factored golomb on a start": factored("golomb", "ternary", True),
    "factored dense and sparse": factored("dense", "sparse at an index", False),
    "quantized low_rank": quantized("low_rank", 4, 0, "normal"),
    "quantized dense": quantized("dense", 3, 8, "uniform"),
    "quantized magnitude": quantized("magnitude of low_rank", 8, 5, "uniform"),
    "quantized sum": quantized("sum of low_rank and sparse", 5, 16, "normal"),
}
EVERY_SHAPE = [name for name in ENTRIES if name.startswith(("dense", "replace", "sparse", "ternary", "golomb", "quantized dense", "subspace"))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
properties = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.differing_executors])
every_entry = pytest.mark.parametrize("name", ENTRIES)

sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16])
matrix_shapes = st.tuples(sizes, sizes)
larger_shapes = st.tuples(st.sampled_from([5, 7, 8, 12, 13, 16]), st.sampled_from([5, 7, 8, 12, 13, 16]))
"""Of enough numbers that an error's mean means something; the smaller ones are compared in float64."""
deep_shapes = st.one_of(matrix_shapes, st.tuples(st.integers(1, 3), sizes, sizes), st.tuples(sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
gains = st.floats(-4, 4, width=16).filter(lambda g: g == 0 or abs(g) > 1e-2)
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(name: str, shape: tuple[int, ...], seed: int, gain: Any = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Update, Equation]:
    """An update of an entry, and the weight that it means, in float64, its gain included."""
    # the direction of a short row that nearly cancels is not known well in any arithmetic
    if "magnitude" in name and math.prod(shape[1 if len(shape) != 3 else 2 :]) < 4:
        reject()
    tensors, constants, equation = ENTRIES[name](Numbers(seed, dtype), shape)
    update = form(name.split()[0]).from_tensors(tensors, json.loads(json.dumps(constants)), shape, gain)
    return update, lambda weight: weight + float(gain) * (equation(weight) - weight)


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def test_every_form_has_an_entry() -> None:
    assert {name.split()[0] for name in ENTRIES} == set(FORMS)
    assert all(FORMS[name].form == name for name in FORMS)


# materialize is the law


@every_entry
@properties
@given(shape=deep_shapes, seed=seeds, gain=gains, dtype=dtypes)
def test_the_dense_update_is_the_equation(name: str, shape: tuple[int, ...], seed: int, gain: float, dtype: torch.dtype) -> None:
    update, equation = make(name, shape, seed, gain)
    weight = random(seed + 5, *shape, dtype=dtype)
    exact = equation(weight.double()) - weight.double()
    found = update.materialize(weight)
    assert update.shape == shape and found.shape == shape and found.dtype == torch.float32
    largest = max(1.0, float(exact.abs().max()), float(weight.abs().max()))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * largest)
    precise = update.materialize(weight.double())
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise, exact, rtol=0, atol=1e-6 * largest)


@every_entry
@properties
@given(shape=deep_shapes, seed=seeds, gain=gains, dtype=dtypes)
def test_applying_rounds_once_to_the_weights_dtype(name: str, shape: tuple[int, ...], seed: int, gain: float, dtype: torch.dtype) -> None:
    update, equation = make(name, shape, seed, gain)
    weight = random(seed + 5, *shape, dtype=dtype)
    before = weight.clone()
    applied, exact = update.apply(weight), equation(weight.double())
    assert applied.dtype == dtype and applied.shape == shape and torch.equal(weight, before)
    half_a_unit = torch.finfo(dtype).eps / 2 * 1.01
    slack = 2e-5 * max(1.0, rms(exact), float(weight.abs().max()))
    assert bool(((applied.double() - exact).abs() <= half_a_unit * exact.abs() + slack).all())


@pytest.mark.parametrize("name", EVERY_SHAPE)
@properties
@given(shape=st.lists(st.integers(0, 5), max_size=4).map(tuple), seed=seeds, gain=gains)
def test_forms_that_act_entry_by_entry_take_every_shape(name: str, shape: tuple[int, ...], seed: int, gain: float) -> None:
    assume(not name.startswith(("ternary", "golomb")) or (shape and (len(shape) != 3 or shape[0])))
    update, equation = make(name, shape, seed, gain)
    weight = random(seed + 5, *shape)
    torch.testing.assert_close(update.apply(weight).double(), equation(weight.double()), rtol=1e-5, atol=1e-5)
    if len(shape) not in (0, 3):
        sliced = update.slice_rows(0, shape[0] // 2)
        assert sliced is not None
        # a product of fewer rows may be summed in another order
        torch.testing.assert_close(sliced.apply(weight[: shape[0] // 2]), update.apply(weight)[: shape[0] // 2], rtol=2 * torch.finfo(torch.float32).eps, atol=1e-5)


@pytest.mark.parametrize("name", ["diagonal rows", "permute rows"])
def test_rows_of_a_vector_are_its_entries(name: str) -> None:
    numbers = random(0, 7) if "diagonal" in name else torch.randperm(7)
    update, weight = form(name.split()[0]).from_tensors({"rows": numbers}, {}, (7,), 1.0), random(1, 7)
    torch.testing.assert_close(update.apply(weight), weight * numbers if "diagonal" in name else weight[numbers])


@every_entry
@properties
@given(shape=deep_shapes, seed=seeds, gain=gains)
def test_an_update_that_does_not_depend_on_the_base_is_linear_in_its_gain(name: str, shape: tuple[int, ...], seed: int, gain: float) -> None:
    update, _ = make(name, shape, seed)
    weight = random(seed + 5, *shape)
    one = update.materialize(weight)
    for other in (update.scaled(gain), make(name, shape, seed, torch.tensor(gain))[0]):
        largest = max(1.0, float(one.abs().max()))
        torch.testing.assert_close(other.materialize(weight), gain * one, rtol=1e-5, atol=1e-5 * largest)
    if not update.depends_on_base:
        assert torch.equal(one, update.materialize(weight + 1))


@every_entry
@properties
@given(shape=deep_shapes, seed=seeds, dtype=dtypes, as_tensor=st.booleans(), transposed=st.booleans())
def test_a_gain_of_zero_is_the_base_exactly(
    name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, as_tensor: bool, transposed: bool
) -> None:
    update, _ = make(name, shape, seed, torch.tensor(0.0) if as_tensor else 0.0)
    weight = random(seed + 5, *shape, dtype=dtype)
    assert torch.equal(update.apply(weight), weight)
    if len(shape) == 2:
        base = DenseBase(weight.T.contiguous() if transposed else weight, random(seed + 6, shape[0], dtype=dtype), transposed)
        x, ids = random(seed + 7, 3, shape[1], dtype=dtype), torch.tensor([[0, shape[0] - 1]])
        plain = base.without_bias().linear(x) + base.bias if update.depends_on_base else base.linear(x)
        if name.startswith(("blocks", "block_affine row", "replace at", "sparse")):  # the same numbers, laid out otherwise
            torch.testing.assert_close(product(x, base, update), plain)
        else:
            assert torch.equal(product(x, base, update), plain)
        assert torch.equal(update.lookup(ids, base), weight[ids])


# products agree with it


@every_entry
@properties
@given(
    shape=larger_shapes, seed=seeds, gain=gains, dtype=dtypes, as_tensor=st.booleans(), narrow=st.booleans(), transposed=st.booleans(),
    biased=st.booleans(),
)  # fmt: skip
def test_linear_equals_the_dense_product(
    name: str, shape: tuple[int, int], seed: int, gain: float, dtype: torch.dtype, as_tensor: bool, narrow: bool, transposed: bool, biased: bool
) -> None:
    update, equation = make(name, shape, seed, torch.tensor(gain) if as_tensor else gain, dtype if narrow else torch.float32)
    weight, x = random(seed + 5, *shape, dtype=dtype), random(seed + 7, 64, shape[1], dtype=dtype)
    bias = random(seed + 6, shape[0], dtype=dtype) if biased else None
    base = DenseBase(weight.T.contiguous() if transposed else weight, bias, transposed)
    new = equation(weight.double())
    added = bias.double() if bias is not None else torch.zeros(shape[0]).double()
    exact = x.double() @ new.T + added
    plain = functional.linear(x, new.to(dtype), bias)
    found = product(x, base, update)
    assert found.dtype == dtype
    # where terms nearly cancel, as at a gain that undoes the base, what they were made of is the measure
    parts = max(rms(x.double() @ weight.double().T), rms(exact), rms(x.double() @ (new - weight.double()).T))
    assert rms(found.double() - exact) <= 4 * max(rms(plain.double() - exact), torch.finfo(dtype).eps * parts / 4)
    assert torch.equal(product(x.reshape(4, 16, -1), base, update).reshape(64, -1), found)


@every_entry
@properties
@given(shape=larger_shapes, seed=seeds, gain=gains, dtype=dtypes)
def test_matmul_is_the_product_of_the_update_alone(name: str, shape: tuple[int, int], seed: int, gain: float, dtype: torch.dtype) -> None:
    update, equation = make(name, shape, seed, gain)
    if update.depends_on_base:
        return
    x, onto = random(seed + 7, 64, shape[1], dtype=dtype), random(seed + 8, 64, shape[0], dtype=dtype)
    alone = equation(torch.zeros(shape).double())
    exact = x.double() @ alone.T
    plain = functional.linear(x, alone.to(dtype))
    floor = 4 * torch.finfo(dtype).eps * rms(exact) + 1e-9
    assert rms(update.matmul(x).double() - exact) <= max(4 * rms(plain.double() - exact), floor)
    before = onto.clone()
    summed = update.matmul(x, onto)
    assert summed.dtype == dtype and torch.equal(onto, before), "what it is added to is not written"
    exact = exact + onto.double()
    assert rms(summed.double() - exact) <= max(4 * rms((plain + onto).double() - exact), floor + torch.finfo(dtype).eps * rms(onto))


@every_entry
@properties
@given(shape=matrix_shapes, seed=seeds, gain=gains, dtype=dtypes, transposed=st.booleans(), data=st.data())
def test_lookup_gives_the_rows_of_the_updated_weight(
    name: str, shape: tuple[int, int], seed: int, gain: float, dtype: torch.dtype, transposed: bool, data: st.DataObject
) -> None:
    update, equation = make(name, shape, seed, gain)
    weight = random(seed + 5, *shape, dtype=dtype)
    size = data.draw(st.sampled_from([(), (3,), (2, 4), (0,)]))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=math.prod(size), max_size=math.prod(size)))).long()
    found = update.lookup(ids.reshape(size), DenseBase(weight.T.contiguous() if transposed else weight, None, transposed))
    exact = equation(weight.double())
    assert found.dtype == dtype and found.shape == (*size, shape[1])
    largest = max(float(exact.abs().max()), float(weight.abs().max()), float((exact - weight).abs().max()), 1.0)
    torch.testing.assert_close(found.double(), exact[ids].reshape(found.shape), rtol=0, atol=16 * torch.finfo(dtype).eps * largest)


@every_entry
@settings(deadline=None, max_examples=5)
@given(shape=matrix_shapes, seed=seeds, gain=gains, as_tensor=st.booleans())
def test_gradients_of_linear_and_lookup_are_those_of_the_dense_weight(
    name: str, shape: tuple[int, int], seed: int, gain: float, as_tensor: bool
) -> None:
    assume(gain != 0)
    update, _ = make(name, shape, seed, torch.tensor(gain) if as_tensor else gain, torch.float64)
    leaves = [t.requires_grad_() for t in update.tensors().values() if t.is_floating_point()]
    weight, x = random(seed + 5, *shape).double(), random(seed + 7, 7, shape[1]).double().requires_grad_()
    y, z = random(seed + 8, 7, shape[0]).double(), random(seed + 9, 3, shape[1]).double()
    ids = torch.tensor([shape[0] - 1, 0, shape[0] - 1])
    new = update.apply(weight)
    routes = [((product(x, DenseBase(weight), update) * y).sum(), (x @ new.T * y).sum(), [x, *leaves])]
    if leaves:
        routes.append(((update.lookup(ids, DenseBase(weight)) * z).sum(), (new[ids] * z).sum(), leaves))
    largest = max(1.0, float(new.detach().abs().max())) * shape[1]
    for fast, slow, wanted in routes:
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6 * largest)
        found = torch.autograd.grad(fast, wanted, retain_graph=True)
        expected = torch.autograd.grad(slow, wanted, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * largest)  # leaves may be float32, and sums cancel


# parts of an update


@every_entry
@properties
@given(experts=st.integers(1, 4), shape=matrix_shapes, seed=seeds, gain=gains)
def test_one_experts_update_is_the_slice_of_the_whole(name: str, experts: int, shape: tuple[int, int], seed: int, gain: float) -> None:
    update, _ = make(name, (experts, *shape), seed, gain)
    weight = random(seed + 5, experts, *shape)
    whole = update.materialize(weight)
    parts = update.unbind()
    assert len(parts) == experts and update.shape == (experts, *shape), "the whole keeps its shape"
    for expert, part in enumerate(parts):
        assert part.shape == shape and float(part.gain) == gain
        torch.testing.assert_close(part.materialize(weight[expert]), whole[expert], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(update[experts - 1].apply(weight[-1]), update.apply(weight)[-1], rtol=1e-5, atol=1e-5)


@every_entry
@properties
@given(shape=deep_shapes, seed=seeds, gain=gains, dtype=dtypes, data=st.data())
def test_slices_of_rows_are_rows_of_the_updated_weight(
    name: str, shape: tuple[int, ...], seed: int, gain: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    update, _ = make(name, shape, seed, gain)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    sliced = update.slice_rows(start, stop)
    if len(shape) == 3:
        assert sliced is None
        update, shape = update[0], shape[1:]
        start, stop = min(start, shape[0]), min(stop, shape[0])
        sliced = update.slice_rows(start, stop)
    needs_the_whole = name in ("permute rows", "permute both", "block_affine output") or "output_map" in name
    assert (sliced is None) == needs_the_whole == (update.slice_rows(0, 0) is None)
    if sliced is None:
        return
    assert sliced.shape == (stop - start, *shape[1:])
    weight = random(seed + 5, *shape, dtype=dtype)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5 + torch.finfo(dtype).eps}
    torch.testing.assert_close(sliced.apply(weight[start:stop]), update.apply(weight)[start:stop], **close)
    again = sliced.slice_rows(0, (stop - start) // 2)
    assert again is not None
    torch.testing.assert_close(again.apply(weight[start : start + again.shape[0]]), update.apply(weight)[start : start + again.shape[0]], **close)


LOW_RANK = ("low_rank", "pooled", "bank", "tucker", "singular_scale", "columns", "rows", "sum of rows, columns and kronecker", "kronecker", "kronecker of products", "quantized low_rank", "factored golomb on a start", "factored dense and sparse", "seeded_low_rank", "seeded_low_rank of one basis", "tiled", "hadamard")


@every_entry
@properties
@given(shape=deep_shapes, seed=seeds, gain=gains)
def test_low_rank_factors_are_the_same_update(name: str, shape: tuple[int, ...], seed: int, gain: float) -> None:
    update, _ = make(name, shape, seed, gain)
    factors = update.low_rank()
    if name not in LOW_RANK:
        assert factors is None
    elif factors is None:
        assert "kronecker" in name or name == "hadamard", "only products of products may be of full rank"
    else:
        assert factors.shape == shape and isinstance(factors, LowRank)
        weight = torch.zeros(shape)
        torch.testing.assert_close(factors.materialize(weight), update.materialize(weight), rtol=1e-5, atol=1e-4)
        assert LowRank.from_tensors(factors.tensors(), {}, shape, 1.0).rank == factors.rank


def test_a_block_that_is_repeated_is_of_low_rank() -> None:
    """MiSS: ``dW = B [I I ... I]`` is LoRA with a fixed A, and a Kronecker product with a row of ones."""
    B = random(0, 12, 3)
    update = form("kronecker").from_tensors({"A": torch.ones(1, 1, 5), "B": B[None]}, {}, (12, 15), 1.0)
    factors = update.low_rank()
    assert factors is not None and factors.rank == 3
    assert torch.equal(factors.materialize(torch.zeros(12, 15)), B @ torch.eye(3).repeat(1, 5))
    assert torch.equal(update.materialize(torch.zeros(12, 15)), B.repeat(1, 5))


# compositions


ADDITIVE = [name for name in ENTRIES if not FORMS[name.split()[0]].depends_on_base and "magnitude" not in name]


@properties
@given(names=st.lists(st.sampled_from(ADDITIVE), min_size=3, max_size=3), shape=deep_shapes, seed=seeds, gain=gains)
def test_a_sum_is_associative_to_rounding(names: list[str], shape: tuple[int, ...], seed: int, gain: float) -> None:
    a, b, c = (make(name, shape, seed + i)[0] for i, name in enumerate(names))
    weight = random(seed + 5, *shape)
    expected = gain * (a.materialize(weight) + b.materialize(weight) + c.materialize(weight))
    for update in (Sum([a, b, c], gain), Sum([Sum([a, b]), c], gain), Sum([a, Sum([b, c])], gain), Sum([c, b, a], gain)):
        torch.testing.assert_close(update.materialize(weight), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(update.unbind()[0].materialize(weight[0]), expected[0], rtol=1e-5, atol=1e-4) if len(shape) == 3 else None


@properties
@given(names=st.lists(st.sampled_from(list(ENTRIES)), min_size=3, max_size=3), shape=matrix_shapes, seed=seeds)
def test_a_chain_is_associative_to_rounding_and_applies_in_order(names: list[str], shape: tuple[int, int], seed: int) -> None:
    a, b, c = (make(name, shape, seed + i, dtype=torch.float64)[0] for i, name in enumerate(names))
    weight, x = random(seed + 5, *shape).double(), random(seed + 6, 5, shape[1]).double()
    expected = c.apply(b.apply(a.apply(weight)))
    close = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, float(expected.abs().max()))}
    for update in (Chain([a, b, c]), Chain([Chain([a, b]), c]), Chain([a, Chain([b, c])])):
        torch.testing.assert_close(update.apply(weight), expected, **close)
        torch.testing.assert_close(update.linear(x, DenseBase(weight)), x @ expected.T, rtol=1e-4, atol=shape[1] * close["atol"] * 4)
        torch.testing.assert_close(update.lookup(torch.tensor([0]), DenseBase(weight)), expected[:1], **close)


def test_a_butterfly_is_a_chain_of_permutations_and_block_rotations() -> None:
    """BOFT: the rotation is orthogonal, so it keeps the norm of every row (hyperspherical energy with it)."""
    rotations = torch.linalg.qr(random(0, 4, 2, 2)).Q
    order = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])
    blocks = form("block_affine").from_tensors({"B": rotations - torch.eye(2)}, {"side": "input"}, (6, 8), 1.0)
    there = form("permute").from_tensors({"columns": order}, {}, (6, 8), 1.0)
    back = form("permute").from_tensors({"columns": order.argsort()}, {}, (6, 8), 1.0)
    weight, P = random(1, 6, 8), torch.eye(8)[:, order]
    butterfly = Chain([blocks, there, blocks, back]).apply(weight)
    R = torch.block_diag(*rotations)
    torch.testing.assert_close(butterfly, weight @ R @ P @ R @ P.T)
    torch.testing.assert_close(butterfly.norm(dim=1), weight.norm(dim=1))


# to disk and back


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes(store_bytes(a)) == bytes(store_bytes(b))


def store_bytes(tensor: torch.Tensor) -> Any:
    from espalier.checkpoint.safetensors_file import tensor_bytes

    return tensor_bytes(tensor)


@every_entry
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=deep_shapes, seed=seeds, gain=gains, dtype=dtypes)
def test_what_is_written_is_read_back_bit_for_bit(name: str, shape: tuple[int, ...], seed: int, gain: float, dtype: torch.dtype, tmp_path: Path) -> None:
    update, _ = make(name, shape, seed, gain, dtype)
    store.save(tmp_path / "delta", store.Delta({"w": update}, {"w": store.Layout(("w",))}, {}), "a card")
    found = store.load(tmp_path / "delta").updates["w"]
    assert (type(found), found.shape, found.gain, found.constants()) == (type(update), shape, gain, update.constants())
    assert found.tensors().keys() == update.tensors().keys() and found.nbytes == update.nbytes
    assert all(same(found.tensors()[key], tensor) for key, tensor in update.tensors().items())
    weight = random(seed + 5, *shape, dtype=dtype)
    assert same(found.apply(weight), update.apply(weight))


# what does not fit is refused before anything is expanded


def rebuilt(name: str, tensors: Tensors, constants: Any, shape: tuple[int, ...]) -> Update | None:
    """The update, or ``None`` where it was refused: in plain words, or as an entry of a manifest that is malformed."""
    try:
        return form(name.split()[0]).from_tensors(tensors, constants, shape, 1.0)
    except EspalierError as error:
        assert "\n" not in str(error)
    except REFUSED_BY_THE_READER:
        pass
    return None


@every_entry
@settings(deadline=None, max_examples=60)
@given(shape=deep_shapes, seed=seeds, data=st.data())
def test_malformed_tensors_are_refused_or_make_an_update_of_the_shape(name: str, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    update, _ = make(name, shape, seed)
    tensors = update.tensors()
    key = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[key]
    change = data.draw(st.sampled_from(["shape", "dtype", "value", "missing", "cut", "longer", "parameter"]))
    if change == "shape":
        tensors[key] = torch.zeros(data.draw(st.lists(st.integers(0, 4), max_size=5)), dtype=tensor.dtype)
    elif change == "dtype":
        other = data.draw(st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64, torch.uint16]))
        tensors[key] = tensor.to(other)
    elif change == "value" and tensor.numel():
        value = data.draw(st.sampled_from([math.nan, math.inf])) if tensor.is_floating_point() else data.draw(st.integers(-(2**31), 2**31 - 1))
        changed = tensor.clone()
        changed.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value if tensor.is_floating_point() else value % 2 ** (8 if tensor.dtype == torch.uint8 else 31)
        tensors[key] = changed
    elif change == "missing":
        del tensors[key]
    elif change == "cut":
        tensors[key] = tensor[..., :-1] if tensor.ndim else tensor.reshape(1)
    elif change == "longer":
        tensors[key] = torch.cat((tensor, tensor), -1) if tensor.ndim else tensor[None]
    else:
        shape = tuple(data.draw(st.lists(st.integers(0, 20), max_size=4)))
    found = rebuilt(name, tensors, update.constants(), shape)
    if found is not None:
        assert found.shape == shape
        if found.tensors().values() and all(t.dtype != torch.uint16 and t.dtype != torch.bool for t in found.tensors().values()):
            assert found.materialize(torch.zeros(shape)).shape == shape


@every_entry
@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 12), (4, 3, 2, 2)], ids=["matrix", "experts", "convolution"])
def test_a_parameter_of_a_huge_shape_is_refused_without_memory(name: str, shape: tuple[int, ...]) -> None:
    update, _ = make(name, shape, 3)
    for huge in ((2**40, *shape[1:]), (*shape[:-1], 2**40), (2**31, 2**31)):
        found = rebuilt(name, update.tensors(), update.constants(), huge)
        assert found is None or found.shape == huge, "a few entries or columns fit any shape; the model's own is compared with it"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_entry
def test_scales_that_are_not_finite_are_refused(name: str, value: float) -> None:
    update, _ = make(name, (8, 12), 0)
    tensors = update.tensors()
    scales = [k for k in tensors if k.rpartition(".")[2] in ("scale", "mean", "magnitude") or ("diagonal" in name and k.rpartition(".")[2] in ("rows", "columns"))]
    for key in scales:
        bad = tensors[key].clone()
        if not bad.is_floating_point() or not bad.numel():
            continue
        bad.view(-1)[-1] = value
        with pytest.raises(EspalierError, match="not finite"):
            form(update.form).from_tensors({**tensors, key: bad}, update.constants(), (8, 12), 1.0)


def nested(levels: int) -> tuple[Tensors, dict[str, Any]]:
    constants: dict[str, Any] = {"parts": {"0": {"form": "dense", "gain": 1.0, "constants": {}}}}
    for _ in range(levels - 1):
        constants = {"parts": {"0": {"form": "sum", "gain": 1.0, "constants": constants}}}
    return {"0." * levels + "values": torch.zeros(2, 2)}, constants


def test_updates_nested_too_deep_are_refused() -> None:
    assert isinstance(form("sum").from_tensors(*nested(8), (2, 2), 1.0), Sum)
    for depth in (9, 200):
        with pytest.raises(EspalierError, match="nested more than 8 levels deep"):
            form("sum").from_tensors(*nested(depth), (2, 2), 1.0)


@pytest.mark.parametrize("whole", ["sum", "magnitude"])
@pytest.mark.parametrize("inner", ["diagonal rows", "chain of low_rank and diagonal", "quantized magnitude", "replace"])
def test_only_additive_parts_stand_in_a_sum_or_a_magnitude(whole: str, inner: str) -> None:
    update, _ = make(inner, (8, 12), 0)
    name = "0" if whole == "sum" else "inner"
    constants = {"parts": {name: {"form": update.form, "gain": 1.0, "constants": update.constants()}}}
    tensors = {f"{name}.{key}": t for key, t in update.tensors().items()} | {"magnitude": torch.ones(8)}
    with pytest.raises(EspalierError, match=f"depends on the base and cannot stand inside a {whole}"):
        form(whole).from_tensors(tensors, constants, (8, 12), 1.0)


# on a live model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny("llama")


@every_entry
@torch.no_grad()
def test_a_stored_update_survives_a_slot_and_a_change_of_the_models_dtype(name: str, model: torch.nn.Module) -> None:
    target = next(t for t in parameters(model) if t.name.endswith("layers.0.self_attn.o_proj.weight"))
    update, _ = make(name, target.shape, 7)
    weight = model.get_parameter(target.name)
    before, plain = weight.clone(), model(tokens()).logits
    weight.copy_(update.apply(before))
    expected = model(tokens()).logits
    weight.copy_(before)
    attach_updates(model, {target.name: update}, "stored")
    try:
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-3, atol=1e-4)
        model.to(torch.bfloat16)
        found = dict(model.named_buffers())
        for key, tensor in update.tensors().items():
            assert same(next(b for n, b in found.items() if n.endswith(f"weight:stored.{key.replace('.', '__')}")), tensor)
        assert rms(model(tokens()).logits - expected) <= 0.2 * rms(expected) + 0.05
    finally:
        detach(model)
        model.to(torch.float32)
        model.load_state_dict({**model.state_dict(), target.name: before})
    assert rms(model(tokens()).logits - plain) <= 0.1 * rms(plain)


# what single forms promise


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (7, 9), (2, 3, 4), (2, 3, 2, 2)], ids=str)
def test_values_of_every_dtype_are_set_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    """NaN payloads, negative zero and patterns that are no number included."""
    kind = getattr(torch, dtype)
    entries = math.prod(shape)
    width = torch.empty(0, dtype=kind).element_size()

    def bits(seed: int) -> torch.Tensor:
        raw = torch.randint(0, 2 if dtype == "bool" else 256, (entries * width,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return raw.view(kind).reshape(shape)

    weight, target = bits(0), bits(1)
    positions = torch.randperm(entries, generator=torch.Generator().manual_seed(2))[: entries // 2].sort().values
    mixed = weight.clone().reshape(-1).view(torch.uint8).reshape(entries, width)
    chosen = target.reshape(-1).view(torch.uint8).reshape(entries, width)[positions]
    mixed[positions] = chosen
    values = chosen.flatten().view(kind)
    dense = form("replace").from_tensors({"values": target}, {}, shape, 1.0)
    assert same(dense.apply(weight), target)
    touched = torch.zeros(entries, dtype=torch.bool)
    touched[positions] = True
    for where in ({"index": positions.int()}, {"index": positions}, {"mask": pack_bits(touched)}):
        update = form("replace").from_tensors({"values": values, **where}, {}, shape, 1.0)
        assert same(update.apply(weight), mixed.flatten().view(kind).reshape(shape))
        if not weight.is_floating_point():
            assert same(update.scaled(0.0).apply(weight), weight)
            with pytest.raises(EspalierError, match=r"the gain is 0\.5; a weight of torch\..* can only be set"):
                update.scaled(0.5).apply(weight)


def test_integers_are_not_converted() -> None:
    update = form("replace").from_tensors({"values": torch.ones(3)}, {}, (3,), 1.0)
    with pytest.raises(EspalierError, match=r"values of torch\.float32 cannot be set in a weight of torch\.int64"):
        update.apply(torch.zeros(3, dtype=torch.int64))


@properties
@given(entries=st.integers(0, 200), bits=st.integers(1, 8), seed=seeds)
def test_packed_codes_come_back_and_take_no_more_than_their_bits(entries: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (entries,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_size(entries, bits) == math.ceil(entries * bits / 8)
    assert torch.equal(unpack_bits(packed, entries, bits), codes)
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    assert stream == int.from_bytes(bytes(packed.tolist()), "little")


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_more_codes_than_are_packed_at_one_time_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, ((1 << 20) + 13,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), len(codes), bits), codes)


@properties
@given(entries=st.integers(0, 100), seed=seeds, data=st.data())
def test_a_slice_of_a_bitmap_is_a_bitmap(entries: int, seed: int, data: st.DataObject) -> None:
    flags = torch.randint(0, 2, (entries,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    start = data.draw(st.integers(0, entries))
    stop = data.draw(st.integers(start, entries))
    part = slice_bits(pack_bits(flags), start, stop)
    assert torch.equal(part, pack_bits(flags[start:stop])) and count_bits(part) == int(flags[start:stop].sum())


def test_a_mask_longer_than_its_blocks_is_sliced_where_it_should_be() -> None:
    entries = 3 * 2**19 + 1000
    positions = torch.randperm(entries, generator=torch.Generator().manual_seed(0))[: entries // 2].sort().values
    shape = (entries // 8, 8)
    values = torch.arange(len(positions)).float()
    for where in (compact(positions, entries), {"index": positions}):
        update = form("sparse").from_tensors({"values": values, **where}, {}, shape, 1.0)
        whole = update.materialize(torch.zeros(1))
        for start in (0, 65535, 65536, 131073, 196600):
            part = update.slice_rows(start, start + 7)
            assert part is not None and torch.equal(part.materialize(torch.zeros(1)), whole[start : start + 7])


def test_a_support_is_spelled_as_is_smaller() -> None:
    assert list(compact(torch.arange(3), 1000)) == ["index"] and compact(torch.arange(3), 1000)["index"].dtype == torch.int32
    assert list(compact(torch.arange(32), 1000)) == ["mask"]
    assert compact(torch.arange(3), 2**33)["index"].dtype == torch.int64


@pytest.mark.parametrize(("bits", "upper"), [(1, [0.6745]), (2, [0.3778, 1.2657]), (3, [0.2026, 0.6254, 1.1137, 1.7920])])
def test_the_normal_levels_are_those_of_the_paper(bits: int, upper: list[float]) -> None:
    found = levels("normal", bits)
    torch.testing.assert_close(found[2 ** (bits - 1) :], torch.tensor(upper), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", ["normal", "uniform"])
def test_levels_are_symmetric_and_ascend(bits: int, codebook: Any) -> None:
    found = levels(codebook, bits)
    assert len(found) == 2**bits and torch.equal(found, -found.flip(0)) and bool((found.diff() > 0).all())


@pytest.mark.parametrize("codebook", ["normal", "uniform"])
@pytest.mark.parametrize("group", [0, 7, 64])
def test_more_bits_are_closer_and_every_number_gets_its_nearest_level(codebook: Any, group: int) -> None:
    values = random(0, 30, 20) * 1e-4 + 3e-4
    errors = []
    for bits in range(1, 9):
        update = Quantized.of(form("dense").from_tensors({"values": values}, {}, (30, 20), 1.0), bits, group, codebook)
        found = update.materialize(torch.zeros(1))
        coded, run = update.coded["values"], torch.arange(600) // (group or 600)
        others = levels(codebook, bits)[None] * coded.scale[run, None] + coded.mean[run, None]
        nearest = (others - values.flatten()[:, None]).abs().min(1).values
        torch.testing.assert_close((found - values).abs().flatten(), nearest, rtol=1e-3, atol=1e-9)
        errors.append(rms(found - values))
        assert update.nbytes == math.ceil(600 * bits / 8) + 8 * len(coded.scale)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 20


def test_a_tensor_of_one_number_or_of_equal_numbers_is_quantized_exactly() -> None:
    for values in (torch.full((1, 1), 0.3), torch.full((4, 5), -0.25)):
        for codebook in ("normal", "uniform"):
            update = Quantized.of(form("dense").from_tensors({"values": values}, {}, tuple(values.shape), 1.0), 2, 0, codebook)  # type: ignore[arg-type]
            assert torch.equal(update.materialize(values), values)
