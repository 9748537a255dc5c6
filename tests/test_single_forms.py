"""What single forms promise, chains of updates on a base, and what is refused.

That every form agrees with its equation on every route is held by ``conformance/test_forms.py``. The equations are
written out here too in float64, entry by entry where that is plainer.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from espalier.delta.base import DenseBase, UpdatedBase, product
from espalier.delta.forms import (
    FORMS,
    Columns,
    Dense,
    Diagonal,
    LowRank,
    Magnitude,
    MaskedLowRank,
    Pooled,
    RandomBases,
    Replace,
    ScaledLowRank,
    Sparse,
    Update,
    form,
)
from espalier.delta.forms.masked import bitmaps
from espalier.errors import EspalierError
from espalier.kernels.philox import Distribution, Stream
from espalier.kernels.seeded import SeededMatrix

ADDITIVE = ("dense", "low_rank", "pooled", "columns", "sparse")
MAGNITUDES = tuple(f"magnitude of {inner}" for inner in ADDITIVE)
KINDS = (*ADDITIVE, "replace", *MAGNITUDES)
SHARDS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
properties = settings(deadline=None, max_examples=20)
every_kind = pytest.mark.parametrize("kind", KINDS)

shapes = st.tuples(st.integers(2, 6), st.integers(2, 6)).map(lambda s: (SHARDS * s[0], SHARDS * s[1]))
deep_shapes = st.builds(lambda lead, shape: (*lead, *shape), st.sampled_from([(), (1,), (3,)]), shapes)
gains = st.floats(-4, 4, width=16).filter(lambda g: g == 0 or abs(g) > 1e-2)
seeds = st.integers(0, 2**16)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choose(seed: int, count: int, chosen: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:chosen]


def make(kind: str, shape: tuple[int, ...], seed: int, gain: Any = 1.0, dtype: torch.dtype = torch.float32) -> Update:
    """A random update of a weight of ``shape`` (last two: out, in), its tensors of ``dtype``."""
    *lead, outputs, inputs = shape
    if kind.startswith("magnitude of "):
        magnitude = random(seed + 9, *lead, outputs, dtype=dtype).abs() + 0.5
        return Magnitude(magnitude, make(kind.removeprefix("magnitude of "), shape, seed, 1.5, dtype), gain)
    if kind in ("dense", "replace"):
        return {"dense": Dense, "replace": Replace}[kind](random(seed, *shape, dtype=dtype), gain)
    if kind == "low_rank":
        return LowRank(random(seed, *lead, outputs, 3, dtype=dtype), random(seed + 1, *lead, 3, inputs, dtype=dtype) / 2, gain)
    if kind == "pooled":
        B, A = random(seed, 20, outputs // SHARDS, dtype=dtype), random(seed + 1, 23, inputs // SHARDS, dtype=dtype) / 2
        generator = torch.Generator().manual_seed(seed + 2)
        index = {n: torch.randint(0, n, (*lead, 3, SHARDS), generator=generator, dtype=torch.int32) for n in (20, 23)}
        return Pooled(B, A, index[20], index[23], gain)
    if kind == "columns":
        index = torch.stack([choose(seed + e, inputs, 5) for e in range(math.prod(lead))]).reshape(*lead, 5)
        return Columns(random(seed, *lead, outputs, 5, dtype=dtype), index, inputs, gain)
    assert kind == "sparse"
    index = choose(seed, math.prod(shape), 1 + math.prod(shape) // 5).sort().values
    return Sparse(random(seed, len(index), dtype=dtype), index, shape, gain)


def additive_equation(update: Update, shape: tuple[int, ...]) -> torch.Tensor:
    """The update that the tensors mean, in float64, gain included."""
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in update.tensors().items()}
    if isinstance(update, Dense):
        dense = tensors["values"]
    elif isinstance(update, LowRank):
        dense = torch.einsum("...or,...ri->...oi", tensors["B"], tensors["A"])
    elif isinstance(update, Pooled):
        A, B = [
            torch.stack([torch.cat([tensors[f][int(s)] for s in row]) for row in tensors[f"index_{f}"].reshape(-1, SHARDS)])
            for f in "AB"
        ]
        rank = update.index_A.shape[-2]
        experts = [B[e : e + rank].T @ A[e : e + rank] for e in range(0, len(A), rank)]
        dense = torch.stack(experts).reshape(shape)
    elif isinstance(update, Columns):
        dense = torch.zeros(shape, dtype=torch.float64)
        flat, values = dense.reshape(-1, *shape[-2:]), tensors["values"].reshape(-1, shape[-2], update.index.shape[-1])
        for expert, row in enumerate(update.index.reshape(-1, update.index.shape[-1]).tolist()):
            for position, column in enumerate(row):
                flat[expert, :, column] = values[expert, :, position]
    else:
        assert isinstance(update, Sparse)
        dense = torch.zeros(shape, dtype=torch.float64)
        dense.view(-1)[update.index] = tensors["values"]
    return dense * float(update.gain)


def equation(update: Update, weight: torch.Tensor) -> torch.Tensor:
    """The updated weight, in float64."""
    weight = weight.double()
    if isinstance(update, Replace):
        return weight + float(update.gain) * (update.values.double() - weight)
    if isinstance(update, Magnitude):
        direction = weight + additive_equation(update.inner, tuple(weight.shape))
        updated = update.magnitude.double()[..., None] * direction / direction.norm(dim=-1, keepdim=True)
        return weight + float(update.gain) * (updated - weight)
    return weight + additive_equation(update, tuple(weight.shape))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


# what single forms promise


@properties
@given(shape=deep_shapes, seed=seeds, as_tensor=st.booleans())
def test_replace_with_a_gain_of_one_is_exact_in_bfloat16(shape: tuple[int, ...], seed: int, as_tensor: bool) -> None:
    values, weight = random(seed, *shape, dtype=torch.bfloat16) * 1e-3, random(seed + 1, *shape, dtype=torch.bfloat16) * 1e3
    update = Replace(values, torch.tensor(1.0) if as_tensor else 1.0)
    assert torch.equal(update.apply(weight).view(torch.int16), values.view(torch.int16))
    assert update.apply(weight.float()).dtype == torch.float32
    part = update.unbind()[0] if len(shape) == 3 else update
    base = DenseBase(weight[0] if len(shape) == 3 else weight)
    x = random(seed + 2, 3, shape[-1], dtype=torch.bfloat16)
    assert torch.equal(part.linear(x, base), functional.linear(x, part.values))
    assert torch.equal(part.lookup(torch.tensor([1, 0]), base), part.values[[1, 0]])


def test_replace_is_exact_whatever_the_base_held() -> None:
    """The dense difference of two checkpoints is not: it rounds, and an infinite entry never comes back."""
    every = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(256, 256)
    for weight in (every.flip(0), torch.full_like(every, math.nan), torch.full_like(every, math.inf)):
        assert torch.equal(Replace(every).apply(weight).view(torch.int16), every.view(torch.int16))


def test_a_magnitude_is_the_norm_of_each_row() -> None:
    weight = random(3, 8, 12)
    update = make("magnitude of low_rank", (8, 12), 0)
    assert isinstance(update, Magnitude)
    torch.testing.assert_close(update.apply(weight).norm(dim=-1), update.magnitude)


@pytest.mark.parametrize("inner", ADDITIVE)
@properties
@given(shape=deep_shapes, seed=seeds, gain=gains, dtype=st.sampled_from(DTYPES), transposed=st.booleans())
def test_row_norms_are_those_of_the_dense_sum(
    inner: str, shape: tuple[int, ...], seed: int, gain: float, dtype: torch.dtype, transposed: bool
) -> None:
    update = make(inner, shape, seed, gain)
    weight = random(seed + 5, *shape, dtype=dtype)
    exact = (weight.double() + additive_equation(update, shape)).norm(dim=-1)
    if transposed:
        weight = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = Magnitude.row_norms(weight, update)
    assert found.dtype == torch.float32 and found.shape == shape[:-1]
    # the cross term of a low-rank sum is a product in the weight's dtype; squares are compared, where terms can cancel
    parts = weight.double().norm(dim=-1).square() + additive_equation(update, shape).norm(dim=-1).square()
    assert bool(((found.double().square() - exact.square()).abs() <= 4 * torch.finfo(dtype).eps * parts).all())
    precise = Magnitude.row_norms(weight.double(), update.with_tensors({n: t.double() for n, t in update.tensors().items() if t.is_floating_point()}))
    torch.testing.assert_close(precise, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_magnitude_over_no_update_is_the_base_exactly(dtype: torch.dtype) -> None:
    """The norm is rounded as the magnitude was, so a start in a narrow dtype is no step away from the base."""
    weight, x = random(0, 8, 12), random(1, 5, 12)
    inner = LowRank(torch.zeros(8, 2, dtype=dtype), random(2, 2, 12, dtype=dtype))
    update = Magnitude(Magnitude.row_norms(weight, inner).to(dtype), inner)
    assert torch.equal(update.apply(weight), weight)
    assert torch.equal(update.linear(x, DenseBase(weight)), functional.linear(x, weight))


def test_no_gradient_flows_through_the_norm() -> None:
    B, A = random(0, 8, 2).requires_grad_(), random(1, 2, 12).requires_grad_()
    assert not Magnitude.row_norms(random(2, 8, 12).requires_grad_(), LowRank(B, A)).requires_grad


@pytest.mark.parametrize("kind", MAGNITUDES)
@properties
@given(shape=shapes, seed=seeds, gain=gains, dtype=st.sampled_from(DTYPES))
def test_a_bias_is_not_scaled_by_a_magnitude(kind: str, shape: tuple[int, int], seed: int, gain: float, dtype: torch.dtype) -> None:
    update = make(kind, shape, seed, gain)
    weight, bias = random(seed + 5, *shape, dtype=dtype), random(seed + 6, shape[0], dtype=dtype)
    x = random(seed + 7, 3, shape[1], dtype=dtype)
    without = product(x, DenseBase(weight), update)
    assert torch.equal(product(x, DenseBase(weight, bias), update), without + bias)
    assert torch.equal(product(torch.zeros_like(x), DenseBase(weight, bias), update), bias.expand(3, -1))


# chains


@properties
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), shape=shapes, seed=seeds, dtype=st.sampled_from(DTYPES),
    biased=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_a_chain_equals_applying_in_order(
    kinds: list[str], shape: tuple[int, int], seed: int, dtype: torch.dtype, biased: bool, transposed: bool
) -> None:
    weight = random(seed + 5, *shape, dtype=dtype)
    bias = random(seed + 6, shape[0], dtype=dtype) if biased else None
    base = DenseBase(weight.T.contiguous() if transposed else weight, bias, transposed)
    chain, applied, exact = base, base.dense(), weight.double()
    for position, kind in enumerate(kinds):
        update = make(kind, shape, seed + 20 * position, 0.75)
        chain, applied, exact = UpdatedBase(chain, update), update.apply(applied), equation(update, exact)
    assert torch.equal(chain.dense(), applied)
    assert chain.shape == torch.Size(shape) and chain.dtype == dtype and chain.bias is bias
    x, ids = random(seed + 7, 64, shape[1], dtype=dtype), torch.tensor([1, 0, 1])
    exact_product = x.double() @ exact.T + (bias.double() if bias is not None else 0)
    plain = functional.linear(x, exact.to(dtype), bias)
    bound = len(kinds) * 4 * max(rms(plain.double() - exact_product), torch.finfo(dtype).eps * rms(exact_product))
    assert rms(chain.linear(x).double() - exact_product) <= bound
    largest = max(float(exact.abs().max()), float(weight.abs().max()), 1.0)
    torch.testing.assert_close(chain.rows(ids).double(), exact[ids], rtol=0, atol=32 * len(kinds) * torch.finfo(dtype).eps * largest)
    unbiased = chain.without_bias()
    assert unbiased.bias is None and torch.equal(unbiased.dense(), applied)
    if biased:
        assert rms((unbiased.linear(x) + bias).double() - exact_product) <= bound


def test_a_transposed_base_is_the_same_weight() -> None:
    weight, bias, x = random(0, 6, 10), random(1, 6), random(2, 3, 10)
    base = DenseBase(weight.T.contiguous(), bias, transposed=True)
    assert base.shape == (6, 10) and torch.equal(base.dense(), weight)
    torch.testing.assert_close(base.linear(x), functional.linear(x, weight, bias))
    assert torch.equal(base.rows(torch.tensor([5, 5])), weight[[5, 5]])


# experts


def test_gradients_of_all_experts_reach_the_shared_tensors() -> None:
    update = make("pooled", (3, 8, 12), 0)
    pools = [update.A.requires_grad_(), update.B.requires_grad_()]
    fast = torch.autograd.grad(sum((part.matmul(random(4, 2, 12)) * random(5, 2, 8)).sum() for part in update.unbind()), pools)
    dense = update.materialize(torch.zeros(3, 8, 12))
    slow = torch.autograd.grad(sum((random(4, 2, 12) @ part.T * random(5, 2, 8)).sum() for part in dense), pools)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


# to tensors and back


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
@every_kind
def test_tensors_of_other_shapes_are_refused(kind: str, lead: tuple[int, ...]) -> None:
    shape = (*lead, 8, 12)
    update = make(kind, shape, 0)
    tensors, constants = update.tensors(), update.constants()
    for name, tensor in tensors.items():
        wrong = [tensor[..., :-1], tensor[..., None], tensor[0], torch.cat((tensor, tensor), -1), tensor.new_zeros(())]
        for other in [*wrong, *([tensor.flatten()] if tensor.ndim > 1 else [])]:
            if "pooled" in kind and name.removeprefix("inner.") in "AB" and other.shape[1:] == tensor.shape[1:]:
                continue  # a pool may have any number of shards that its index does not reach beyond
            with pytest.raises(EspalierError):
                form(update.form).from_tensors({**tensors, name: other}, constants, shape, 1.0)
    fits_wider = kind.endswith(("columns", "sparse"))  # what they reach is still there
    for other in ((*lead, 12, 8), (*lead, 8, 13), (*lead, 8, 3), (*lead, 7, 12), (2, *shape)):
        if (fits_wider and other[-1] == 13) or (kind == "sparse" and math.prod(other) >= math.prod(shape)):
            continue
        with pytest.raises(EspalierError):
            form(update.form).from_tensors(tensors, constants, other, 1.0)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("kind", ["columns", "sparse", "pooled", "magnitude of columns", "magnitude of pooled"])
def test_indices_out_of_range_or_of_another_kind_are_refused(kind: str, lead: tuple[int, ...]) -> None:
    shape = (*lead, 8, 12)
    update = make(kind, shape, 0)
    tensors, constants = update.tensors(), update.constants()
    for name in [n for n in tensors if "index" in n]:
        index = tensors[name]
        for wrong in (-1, -(2**31), 23 if "pooled" in kind else 12 if "columns" in kind else math.prod(shape), 2**31 - 1):
            bad = index.clone()
            bad.view(-1)[-1] = wrong
            with pytest.raises(EspalierError, match=r"index.* reaches from"):
                form(update.form).from_tensors({**tensors, name: bad}, constants, shape, 1.0)
        for dtype in (torch.float32, torch.bool, torch.uint8, torch.uint64):
            with pytest.raises(EspalierError, match="index"):
                form(update.form).from_tensors({**tensors, name: index.to(dtype)}, constants, shape, 1.0)
        for dtype in (torch.int32, torch.int64):
            again = form(update.form).from_tensors({**tensors, name: index.to(dtype)}, constants, shape, 1.0)
            assert torch.equal(again.materialize(torch.ones(shape)), update.materialize(torch.ones(shape)))


def test_indices_that_name_an_entry_twice_are_refused() -> None:
    columns, sparse = make("columns", (3, 8, 12), 0).tensors(), make("sparse", (8, 12), 0).tensors()
    columns["index"][1, 3] = columns["index"][1, 0]
    with pytest.raises(EspalierError, match="a column twice"):
        Columns.from_tensors(columns, {}, (3, 8, 12), 1.0)
    for bad in (sparse["index"].flip(0), torch.cat((sparse["index"][:1], sparse["index"][:-1]))):
        with pytest.raises(EspalierError, match="not sorted"):
            Sparse.from_tensors({**sparse, "index": bad}, {}, (8, 12), 1.0)


@every_kind
def test_tensors_of_integers_are_refused_where_numbers_are_meant(kind: str) -> None:
    update = make(kind, (8, 12), 0)
    for name in [n for n in update.tensors() if "index" not in n and kind != "replace"]:
        for dtype in (torch.int64, torch.float8_e4m3fn):
            tensors = {**update.tensors(), name: update.tensors()[name].to(dtype)}
            with pytest.raises(EspalierError, match="floating point"):
                form(update.form).from_tensors(tensors, update.constants(), (8, 12), 1.0)


@pytest.mark.parametrize("inner", ["magnitude", "replace", "nonsense"])
def test_a_magnitude_stands_on_known_additive_forms_only(inner: str) -> None:
    update = make("magnitude of dense", (8, 12), 0)
    with pytest.raises(EspalierError, match=inner):
        Magnitude.from_tensors(update.tensors(), {"inner": inner, "inner_gain": 1.0}, (8, 12), 1.0)


def test_an_unknown_form_is_refused_with_those_known() -> None:
    with pytest.raises(EspalierError, match=r"unknown form 'clifford'.*columns, dense, .*low_rank"):
        form("clifford")
    assert all(form(name) is kind and kind.form == name for name, kind in FORMS.items())


def test_bytes_count_private_tensors_once_and_shared_ones_not() -> None:
    assert make("low_rank", (8, 12), 0).nbytes == 4 * 3 * (8 + 12)
    assert make("dense", (8, 12), 0, dtype=torch.bfloat16).nbytes == 2 * 8 * 12
    assert make("columns", (8, 12), 0).nbytes == 4 * 8 * 5 + 8 * 5
    pooled = make("pooled", (8, 12), 0)
    assert isinstance(pooled, Pooled)
    shared = Pooled(pooled.B, pooled.A, pooled.index_B, pooled.index_A, 1.0, {"A": "a", "B": "b"})
    assert shared.nbytes == 4 * 2 * 3 * SHARDS and pooled.nbytes == shared.nbytes + 4 * (20 * 2 + 23 * 3)


def test_a_part_of_a_magnitude_can_be_detached_and_moved() -> None:
    update = make("magnitude of low_rank", (8, 12), 0)
    moved = update.with_tensors({"inner.B": torch.zeros(8, 3)})
    assert isinstance(moved, Magnitude) and moved.form == "magnitude"
    assert moved.magnitude is update.tensors()["magnitude"] and not moved.tensors()["inner.B"].any()
    assert update.tensors()["inner.B"].any()


def test_a_product_with_many_entries_keeps_no_dense_weight_and_shows_its_gradient_once() -> None:
    """What is between the two passes: the input and the values. In the backward pass one dense gradient, which a method may see."""
    shape = (40, 30)
    index = torch.randperm(1200)[:500].sort().values
    weight, x = torch.randn(shape), torch.randn(7, 3, 30, requires_grad=True)
    for base in (DenseBase(weight), None):
        update, values = Sparse(torch.randn(500, requires_grad=True), index, shape, 0.5), []
        update.watch = lambda gradient, seen=values: seen.append(gradient)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            y = update.matmul(x) if base is None else update.linear(x, base)
        assert max(kept) <= max(x.numel(), 500) < weight.numel()
        target = torch.randn_like(y)
        got = torch.autograd.grad((y * target).sum(), (x, update.values))
        dense = torch.zeros(shape) if base is None else weight.clone()
        leaf = dense.view(-1).index_add(0, index, 0.5 * update.values.detach()).view(shape).requires_grad_()
        of_x, of_weight = torch.autograd.grad((x @ leaf.T * target).sum(), (x, leaf))
        torch.testing.assert_close(got, (of_x, 0.5 * of_weight.flatten()[index]), rtol=1e-4, atol=1e-5)
        (seen,) = values
        torch.testing.assert_close(seen, of_weight, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_every_expert_is_shown_with_its_number() -> None:
    update = Sparse(torch.zeros(4, requires_grad=True), torch.tensor([1, 5, 14, 20]), (2, 3, 4))
    seen: dict[int | None, torch.Tensor] = {}
    update.watch = lambda gradient, expert=None: seen.update({expert: gradient})
    x, weight = torch.randn(5, 4), torch.randn(2, 3, 4)
    for number, expert in enumerate(update.unbind()):
        expert.linear(x, DenseBase(weight[number])).sum().backward()
    update.apply(weight).sum().backward()
    assert set(seen) == {0, 1, None} and seen[None].shape == (2, 3, 4)
    torch.testing.assert_close(seen[1], x.sum(0).expand(3, 4))


@pytest.mark.parametrize("kind", ["sparse", "columns", "masked_low_rank", "scaled_low_rank", "random_bases"])
@pytest.mark.parametrize("below", ["update", "weight", "nothing"])
@pytest.mark.parametrize("batch", [(), (3, 4)])
def test_what_trains_below_a_form_gets_its_gradient_and_tokens_may_be_of_any_shape(kind: str, below: str, batch: tuple[int, ...]) -> None:
    outputs, inputs = 6, 5
    drawn = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float64)

    weight, B, A, x = numbers(outputs, inputs), numbers(outputs, 2), numbers(2, inputs), numbers(*batch, inputs)
    mask = bitmaps(numbers(outputs, inputs) > 0)
    made: dict[str, Update] = {
        "sparse": Sparse(numbers(9), torch.arange(0, 27, 3), (outputs, inputs)),
        "columns": Columns(numbers(outputs, 2), torch.tensor([1, 3]), inputs),
        "masked_low_rank": MaskedLowRank(numbers(outputs, 2), numbers(2, inputs), mask),
        "scaled_low_rank": ScaledLowRank(numbers(outputs, 2), numbers(2, inputs)),
        "random_bases": RandomBases({"lam": numbers(2, 2), "gamma": numbers(2, inputs), "B": numbers(outputs, 4), "A": numbers(2, inputs)}, {}, (outputs, inputs)),
    }
    update, lower = made[kind], LowRank(B, A)
    trained = {"update": [B, A], "weight": [weight], "nothing": []}[below] + [next(iter(update.tensors().values()))]
    for tensor in trained:
        tensor.requires_grad_()
    base = UpdatedBase(DenseBase(weight), lower) if below == "update" else DenseBase(weight)
    dense = update.apply(lower.apply(weight) if below == "update" else weight)
    weigh = numbers(*batch, outputs)
    found = torch.autograd.grad((update.linear(x, base) * weigh).sum(), trained)
    expected = torch.autograd.grad(((x @ dense.T) * weigh).sum(), trained)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("kind", ["magnitude", "rows", "columns"])
def test_a_scale_near_one_is_not_rounded_to_it_in_bfloat16(kind: str) -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    base = DenseBase(weight.bfloat16())
    scale = torch.full((32 if kind == "columns" else 64,), 1.003)
    update = (
        Magnitude(scale * base.dense().float().norm(dim=1), LowRank(torch.zeros(64, 1), torch.zeros(1, 32))) if kind == "magnitude"
        else Diagonal(**{"rows": None, "columns": None, kind: scale}, shape=(64, 32))  # type: ignore[arg-type]
    )  # fmt: skip
    ratio = update.linear(x, base).float().norm() / base.linear(x).float().norm()
    assert float(ratio) == pytest.approx(1.003, abs=5e-4)


def test_another_gain_is_that_of_experts_that_were_unbound_before() -> None:
    stream, uniform = Stream(0, "bases"), Distribution("uniform", (-1.0, 1.0))
    factors = {"B": SeededMatrix.of(stream, 8, 8, uniform), "A": SeededMatrix.of(stream, 4, 8, uniform)}
    update = RandomBases({"lam": random(0, 3, 2, 4), "gamma": random(1, 3, 2, 8)}, factors, (3, 8, 8), 1.0)
    weight = torch.zeros(8, 8)
    whole = update.unbind()[1].materialize(weight)
    torch.testing.assert_close(update.scaled(0.5).unbind()[1].materialize(weight), whole / 2)
