"""Products with a seeded matrix: what they are, their gradients, and how little of the matrix they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

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
