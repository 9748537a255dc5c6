"""Products with a seeded matrix: what they are, their gradients, and how little of the matrix they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from espalier.delta.base import DenseBase, product
from espalier.delta.forms import Seeded, SeededLowRank, Update, form
from espalier.delta.forms.update import matrix_shape
from espalier.delta.store import Delta, Layout, load, save
from espalier.errors import EspalierError
from espalier.kernels.philox import GAUSSIAN, RADEMACHER, Distribution, Stream
from espalier.kernels.seeded import SeededMatrix, seeded_combination, seeded_linear, seeded_matmul

DISTRIBUTIONS = (GAUSSIAN, RADEMACHER, Distribution("uniform", (-1.0, 1.0)), Distribution("sparse_rademacher", (3.0,)))
sizes = st.integers(1, 9)
bounds = st.sampled_from([1, 64, 200, 16 << 20])
"""Bytes of a block: one row at a time, some rows, all."""


def matrix(rows: int, columns: int, distribution: Distribution = GAUSSIAN, scale: float = 0.5, position: int = 3) -> SeededMatrix:
    return SeededMatrix.of(Stream(5, "basis", position), rows, columns, distribution, scale)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, distribution=st.sampled_from(DISTRIBUTIONS), position=st.integers(0, 9), data=st.data())
def test_a_seeded_matrix_is_its_streams_numbers(
    rows: int, columns: int, distribution: Distribution, position: int, data: st.DataObject
) -> None:
    stream = Stream(5, "basis", position)
    seeded = SeededMatrix.of(stream, rows, columns, distribution, 0.5)
    assert stream.position == position
    dense = stream.draw(distribution, rows, columns) * 0.5
    assert torch.equal(seeded.dense(), dense)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(seeded.narrow(start, stop).dense(), dense[start:stop])


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, distribution=st.sampled_from(DISTRIBUTIONS), bound=bounds)
def test_the_product_is_that_of_the_dense_matrix(rows: int, columns: int, distribution: Distribution, bound: int) -> None:
    seeded = matrix(rows, columns, distribution)
    dense = seeded.dense().double()
    x, y = random(0, 2, 3, columns).requires_grad_(), random(1, 2, 3, rows)
    found = seeded_matmul(x, seeded, bound)
    torch.testing.assert_close(found, x @ dense.T)
    torch.testing.assert_close(torch.autograd.grad((found * y).sum(), x)[0], y @ dense)


@settings(deadline=None, max_examples=40)
@given(outputs=sizes, inputs=sizes, count=sizes, distribution=st.sampled_from(DISTRIBUTIONS), bound=bounds)
def test_a_combination_and_its_product_are_those_of_the_dense_bases(
    outputs: int, inputs: int, count: int, distribution: Distribution, bound: int
) -> None:
    seeded = matrix(outputs * inputs, count, distribution)
    bases = seeded.dense().double().view(outputs, inputs, count)
    x, c, y = random(0, 4, inputs).requires_grad_(), random(1, count).requires_grad_(), random(2, 4, outputs)
    dense = bases @ c
    combined = seeded_combination(c, seeded, outputs, inputs, block_bytes=bound)
    torch.testing.assert_close(combined, dense)
    of_dense = (y.T @ x).detach()
    torch.testing.assert_close(torch.autograd.grad(combined, c, of_dense)[0], torch.autograd.grad(dense, c, of_dense)[0])
    found, expected = seeded_linear(x, c, seeded, bound), x @ (bases @ c).T
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad((found * y).sum(), (x, c)), torch.autograd.grad((expected * y).sum(), (x, c)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_finite_differences() -> None:
    x, c = random(0, 3, 5).requires_grad_(), random(1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: seeded_matmul(x, matrix(6, 5), 40), x)
    assert torch.autograd.gradgradcheck(lambda x: seeded_matmul(x, matrix(6, 5), 40).square(), x)
    assert torch.autograd.gradcheck(lambda c: seeded_combination(c, matrix(10, 4), 2, 5, block_bytes=40), c)
    assert torch.autograd.gradcheck(lambda x, c: seeded_linear(x, c, matrix(10, 4), 40), (x, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_keep_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    """Error at most 4 times the plain product's own, both against float64."""
    seeded, x, c = matrix(24 * 32, 8, scale=0.3), random(0, 64, 32, dtype=dtype), random(1, 8, dtype=torch.float32)
    dense = (seeded.dense().double() @ c.double()).view(24, 32)
    exact = x.double() @ dense.T
    found, plain = seeded_linear(x, c, seeded, 999), x @ dense.to(dtype).T
    assert found.dtype == dtype and seeded_combination(c, seeded, 24, 32).dtype == torch.float32
    assert float((found.double() - exact).norm()) <= 4 * float((plain.double() - exact).norm())
    square = matrix(24, 32)
    exact, plain = x.double() @ square.dense().double().T, x @ square.dense().to(dtype).T
    found = seeded_matmul(x, square, 999)
    assert found.dtype == dtype and float((found.double() - exact).norm()) <= 4 * float((plain.double() - exact).norm())


def test_nothing_of_the_matrix_is_saved_for_backward() -> None:
    saved: list[torch.Tensor] = []
    x, c = random(0, 3, 50).requires_grad_(), random(1, 7).requires_grad_()
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        seeded_matmul(x, matrix(40, 50))
        assert not saved
        seeded_linear(x, c, matrix(40 * 50, 7))
    assert sum(t.numel() for t in saved) == 3 * 50 + 7


def test_products_hold_a_block_of_the_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.kernels import seeded

    counts: list[int] = []
    drawing = seeded.numbers
    monkeypatch.setattr(seeded, "numbers", lambda *a: counts.append(a[2]) or drawing(*a))  # type: ignore[func-returns-value]
    x, c = random(0, 3, 50).requires_grad_(), random(1, 7).requires_grad_()
    y = seeded_matmul(x, matrix(40, 50), 1000).sum() + seeded_linear(x, c, matrix(40 * 50, 7), 1000).sum()
    y.backward()
    assert max(counts) <= 250 and sum(counts) == 2 * 40 * 50 + 2 * 40 * 50 * 7


def test_recomputation_changes_nothing() -> None:
    def layer(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.tanh(seeded_linear(torch.tanh(seeded_matmul(x, matrix(6, 5))), c, matrix(4 * 6, 3)))

    tensors = random(0, 2, 5).requires_grad_(), random(1, 3).requires_grad_()
    plain, again = layer(*tensors), checkpoint(layer, *tensors, use_reentrant=False)
    assert torch.equal(plain, again)
    for a, b in zip(torch.autograd.grad(plain.sum(), tensors), torch.autograd.grad(again.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_products_compile_in_one_graph() -> None:
    square, bases = matrix(6, 5), matrix(4 * 6, 3)

    def layer(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return seeded_linear(seeded_matmul(x, square), c, bases) + square.dense().sum()

    def gradients(function: Any) -> tuple[torch.Tensor, ...]:
        x, c = random(0, 2, 5, dtype=torch.float32).requires_grad_(), random(1, 3, dtype=torch.float32).requires_grad_()
        return torch.autograd.grad(function(x, c).square().sum(), (x, c))

    compiled = gradients(torch.compile(layer, fullgraph=True, backend="eager"))
    for a, b in zip(compiled, gradients(layer), strict=True):
        torch.testing.assert_close(a, b)


def test_tensors_without_data_cost_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory plan runs a step on them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from espalier.kernels import seeded

    monkeypatch.setattr(seeded, "numbers", None)
    with FakeTensorMode():
        x, c = torch.zeros(3, 50, requires_grad=True), torch.zeros(7, requires_grad=True)
        y = seeded_linear(seeded_matmul(x, matrix(50, 50)), c, matrix(40 * 50, 7)) + matrix(3, 40).dense()
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == (3, 50) and c.grad is not None and c.grad.shape == (7,)


def test_a_matrix_of_integers_is_refused() -> None:
    with pytest.raises(EspalierError, match="integers32"):
        matrix(2, 2, Distribution("integers32"))


# the forms of seeds


def seeded_update(shape: tuple[int, ...], gain: Any = 0.7, count: int = 3, dtype: torch.dtype = torch.float32) -> Seeded:
    size = math.prod(shape)
    return Seeded(random(1, count, dtype=dtype), matrix(size, count), shape, gain)


KINDS = ("lora-fa", "nola", "vera", "a combination with b")


def low_rank_update(
    kind: str, shape: tuple[int, ...], gain: Any = 0.7, rank: int = 2, dtype: torch.dtype = torch.float32
) -> SeededLowRank:
    *lead, outputs, inputs = matrix_shape(shape)
    count, experts = 5, math.prod(lead)
    frozen = {"B": matrix(experts * outputs, rank, RADEMACHER), "A": matrix(experts * rank, inputs, position=900)}
    combined = {"B": matrix(experts * outputs * rank, count), "A": matrix(experts * rank * inputs, count, position=900)}
    tensors = {
        "B": random(2, *lead, outputs, rank, dtype=dtype), "coefficients_B": random(3, *lead, count, dtype=dtype),
        "coefficients_A": random(4, *lead, count, dtype=dtype), "b": random(5, *lead, outputs, dtype=dtype),
        "d": random(6, *lead, rank, dtype=dtype),
    }  # fmt: skip
    bases, names = {
        "lora-fa": ({"A": frozen["A"]}, ["B"]),
        "nola": (combined, ["coefficients_B", "coefficients_A"]),
        "vera": (frozen, ["b", "d"]),
        "a combination with b": ({"A": combined["A"]}, ["B", "coefficients_A", "b"]),
    }[kind]
    return SeededLowRank(shape, rank, bases, {name: tensors[name] for name in names}, gain)


def equation(update: Update) -> torch.Tensor:
    """The update written out in float64, one expert, one basis at a time."""
    if isinstance(update, Seeded):
        bases = update.matrix.dense().double()
        return float(update.gain) * sum(c * bases[:, i] for i, c in enumerate(update.coefficients.double())).reshape(update.shape)
    assert isinstance(update, SeededLowRank)
    *lead, outputs, inputs = matrix_shape(update.shape)
    made = []
    for e in range(math.prod(lead)):
        tensors = {n: t.double()[e] if lead else t.double() for n, t in update.tensors().items()}
        factors = []
        for name, size in (("B", (outputs, update.rank)), ("A", (update.rank, inputs))):
            if name in tensors:
                factors.append(tensors[name])
                continue
            numbers = update.bases[name].dense().double()
            mine = numbers.view(math.prod(lead), *(size if f"coefficients_{name}" not in tensors else (math.prod(size), -1)))[e]
            coefficients = tensors.get(f"coefficients_{name}")
            factors.append(mine if coefficients is None else sum(c * mine[:, i] for i, c in enumerate(coefficients)).reshape(size))
        B, A = factors
        d, b = tensors.get("d", torch.ones(update.rank).double()), tensors.get("b", torch.ones(outputs).double())
        made.append(float(update.gain) * torch.diag(b) @ B @ torch.diag(d) @ A)
    return torch.stack(made).reshape(update.shape)


UPDATES: dict[str, Callable[..., Update]] = {"seeded": seeded_update, **{kind: partial(low_rank_update, kind) for kind in KINDS}}
every_update = pytest.mark.parametrize("make", UPDATES.values(), ids=UPDATES)


@every_update
@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (6, 2, 1, 3)], ids=["matrix", "experts", "convolution"])
def test_the_dense_update_is_the_equation(make: Callable[..., Update], shape: tuple[int, ...]) -> None:
    update = make(shape)
    exact = equation(update)
    assert update.shape == shape
    dense = update.materialize(torch.zeros(shape))
    assert dense.dtype == torch.float32 and dense.shape == shape
    torch.testing.assert_close(dense.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(update.materialize(torch.zeros(shape, dtype=torch.float64)), exact)
    if (factors := update.low_rank()) is not None:
        torch.testing.assert_close(factors.materialize(torch.zeros(shape, dtype=torch.float64)), exact, rtol=1e-5, atol=1e-5)


def test_coefficients_update_what_is_no_matrix() -> None:
    update = seeded_update((7,))
    torch.testing.assert_close(update.materialize(torch.zeros(7)).double(), equation(update), rtol=1e-5, atol=1e-5)


@every_update
def test_experts_and_rows_are_drawn_without_the_others(make: Callable[..., Update]) -> None:
    whole = make((3, 6, 4))
    dense = whole.materialize(torch.zeros(3, 6, 4))
    for expert, part in enumerate(whole.unbind()):
        assert part.shape == (6, 4) and whole[expert].shape == (6, 4)
        torch.testing.assert_close(part.materialize(torch.zeros(6, 4)), dense[expert])
        rows = part.slice_rows(1, 5)
        assert rows is not None and rows.shape == (4, 4)
        torch.testing.assert_close(rows.materialize(torch.zeros(4, 4)), dense[expert, 1:5])
        again = rows.slice_rows(2, 3)
        assert again is not None
        torch.testing.assert_close(again.materialize(torch.zeros(1, 4)), dense[expert, 3:4])
    convolution = make((6, 2, 1, 3))
    rows = convolution.slice_rows(2, 6)
    assert rows is not None and whole.slice_rows(0, 1) is None
    torch.testing.assert_close(rows.materialize(torch.zeros(4, 2, 1, 3)), convolution.materialize(torch.zeros(6, 2, 1, 3))[2:])


@every_update
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_the_form_are_those_of_the_dense_update(make: Callable[..., Update], dtype: torch.dtype) -> None:
    """Error at most 4 times the plain dense product's own, both against float64."""
    update, weight, x = make((24, 32), torch.tensor(0.3)), random(7, 24, 32, dtype=dtype), random(8, 2, 64, 32, dtype=dtype)
    base = DenseBase(weight, random(9, 24, dtype=dtype))
    updated = weight.double() + equation(update)
    exact = x.double() @ updated.T + base.bias.double()  # type: ignore[union-attr]
    plain = functional.linear(x, updated.to(dtype), base.bias)
    found = product(x, base, update)
    assert found.dtype == dtype
    assert float((found.double() - exact).norm()) <= 4 * float((plain.double() - exact).norm())
    ids = torch.tensor([[0, 3], [3, 23]])
    torch.testing.assert_close(update.lookup(ids, base).double(), updated[ids], rtol=3e-2, atol=5e-2)
    assert torch.equal(update.scaled(0.0).linear(x, base), base.linear(x)) and torch.equal(update.scaled(0.0).apply(weight), weight)


@every_update
def test_gradients_of_the_products_are_those_of_the_dense_update(make: Callable[..., Update]) -> None:
    update = make((6, 4), dtype=torch.float64)
    tensors = {name: t.requires_grad_() for name, t in update.tensors().items()}
    x, y = random(8, 5, 4).requires_grad_(), random(9, 5, 6)
    wanted = [x, *tensors.values()]
    fast = torch.autograd.grad((update.matmul(x) * y).sum(), wanted)
    slow = torch.autograd.grad((x @ update.materialize(torch.zeros(6, 4).double()).T * y).sum(), wanted)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


@every_update
def test_the_forms_product_compiles_in_one_graph(make: Callable[..., Update]) -> None:
    update, base, x = make((6, 4)), DenseBase(random(7, 6, 4, dtype=torch.float32)), random(8, 5, 4, dtype=torch.float32)
    names = list(update.tensors())
    compiled = torch.compile(
        lambda x, *t: update.with_tensors(dict(zip(names, t, strict=True))).linear(x, base), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x, *update.tensors().values()), update.linear(x, base))


# to tensors and back


def read(update: Update, shape: tuple[int, ...] | None = None, tensors: Any = None, **constants: Any) -> Update:
    written = {**json.loads(json.dumps(update.constants())), **constants}
    return form(update.form).from_tensors(tensors or update.tensors(), written, shape or update.shape, 0.7)


@every_update
@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (6, 2, 1, 3)], ids=["matrix", "experts", "convolution"])
def test_tensors_and_constants_rebuild_the_update(make: Callable[..., Update], shape: tuple[int, ...]) -> None:
    update = make(shape)
    again = read(update)
    assert again.constants() == update.constants() and again.shape == shape
    assert torch.equal(again.materialize(torch.zeros(shape)), update.materialize(torch.zeros(shape)))
    assert again.nbytes == update.nbytes == 4 * sum(t.numel() for t in update.tensors().values())
    if len(shape) != 3:
        rows = update.slice_rows(1, 3)
        assert rows is not None
        like = torch.zeros(rows.shape)
        assert torch.equal(read(rows).materialize(like), rows.materialize(like))


@every_update
def test_tensors_that_do_not_fit_are_refused(make: Callable[..., Update]) -> None:
    update = make((6, 4))
    for name, tensor in update.tensors().items():
        wrong = [tensor[None], tensor.new_zeros(()), tensor.to(torch.int64)]
        if "coefficients" not in name:
            wrong.append(tensor[:-1])
        for other in wrong:
            with pytest.raises(EspalierError, match=f"{name} (has|is)"):
                read(update, tensors={**update.tensors(), name: other})


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"seed": "7"}, "seed is '7'"),
        ({"seed": True}, "seed is True"),
        ({"name": 3}, "name 3"),
        ({"position": -1}, "position is -1"),
        ({"position": 2**63 - 5}, "position is"),
        ({"scale": math.inf}, "scale is inf"),
        ({"distribution": "cauchy"}, "distribution is 'cauchy'"),
        ({"distribution": "integers32"}, "integers32"),
        ({"parameters": [1.0]}, "takes 0 finite numbers"),
    ],
)
def test_a_basis_that_is_none_is_refused(constants: dict[str, Any], said: str) -> None:
    with pytest.raises(EspalierError, match=said):
        read(seeded_update((6, 4)), **constants)


@pytest.mark.parametrize("rank", [0, -1, 5, 2**40, 2.0, True])
def test_a_rank_that_makes_factors_larger_than_the_weight_is_refused(rank: Any) -> None:
    """Nothing stored bounds the rank of two frozen factors, so the weight does."""
    update = low_rank_update("vera", (6, 4))
    with pytest.raises(EspalierError, match=r"rank is .*from 1 to 4"):
        read(update, tensors={"b": update.tensors()["b"]}, rank=rank)


def test_a_factor_is_a_tensor_or_a_basis() -> None:
    fa, nola, vera = (low_rank_update(kind, (6, 4)) for kind in ("lora-fa", "nola", "vera"))
    for tensors, bases in (
        ({}, vera.constants()["bases"]),
        (fa.tensors(), {}),
        (fa.tensors(), vera.constants()["bases"]),
        (fa.tensors() | nola.tensors(), fa.constants()["bases"]),
    ):
        with pytest.raises(EspalierError, match=r"either a tensor or a basis|no tensor"):
            SeededLowRank.from_tensors(tensors, {"rank": 2, "bases": bases}, (6, 4), 1.0)


def test_the_bases_of_two_names_differ() -> None:
    one, other = (SeededMatrix.of(Stream(5, name), 24, 3, GAUSSIAN) for name in ("layers.0", "layers.1"))
    assert not torch.equal(one.dense(), other.dense())


def test_a_delta_of_seeds_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Only what is trained is in its file."""
    updates = {f"{kind}.weight": make((6, 4)) for kind, make in UPDATES.items()}
    size = save(tmp_path, Delta(updates, {name: Layout() for name in updates}), "")
    again = load(tmp_path).updates
    for name, update in updates.items():
        assert again[name].constants() == update.constants()
        assert torch.equal(again[name].materialize(torch.zeros(6, 4)), update.materialize(torch.zeros(6, 4)))
    assert size < 4 * sum(t.numel() for u in updates.values() for t in u.tensors().values()) + 2000
