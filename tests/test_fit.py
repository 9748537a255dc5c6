"""Fitting an update into another form: exactly what can be exact, the best of its kind what cannot, the same everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.delta.fit import (
    TARGETS,
    columns,
    dense,
    fit,
    low_rank,
    quantized,
    relative_error,
    rows,
    sparse,
    ternary,
)
from espalier.delta.forms import (
    Columns,
    Dense,
    Golomb,
    Kronecker,
    LowRank,
    Magnitude,
    Quantized,
    Replace,
    Rows,
    Sparse,
    Sum,
    Ternary,
    Update,
)
from espalier.delta.selection import across, kept, largest
from espalier.errors import EspalierError

properties = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**16)
densities = st.floats(0, 1)
shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values(update: Update, *shape: int) -> torch.Tensor:
    return update.materialize(torch.zeros(shape or update.shape))


# exactly k, ties by index


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=30), data=st.data())
@properties
def test_exactly_k_are_chosen_and_of_equal_ones_the_first(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    right = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    assert largest(torch.tensor(scores).float(), k).tolist() == right
    batch = torch.tensor([scores, scores[::-1]]).float()
    assert largest(batch, k)[0].tolist() == right and largest(batch, k).shape == (2, k)


@given(shape=shapes, seed=seeds, density=densities, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@properties
def test_a_sparse_fit_keeps_exactly_k_entries_as_they_are(shape: tuple[int, ...], seed: int, density: float, dtype: torch.dtype) -> None:
    """bf16 of few values: ties are many, and tensors are smaller than 1 / density."""
    update = (random(seed, *shape) * 2).round().to(dtype) / 2
    made = sparse(update, density)
    entries, flat = math.prod(shape), update.float().flatten()
    k = 0 if density == 0 else max(1, round(density * entries))
    assert isinstance(made, Sparse) and len(made.values) == k == kept(entries, density)
    right = sorted(sorted(range(entries), key=lambda i: (-abs(float(flat[i])), i))[:k])
    assert made.positions.tolist() == right
    assert torch.equal(made.values, flat[right])


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=seeds, density=st.floats(0.001, 1), coarse=st.booleans())
@properties
def test_a_share_of_many_vectors_is_exactly_that_share_of_their_largest_numbers(
    sizes: list[int], seed: int, density: float, coarse: bool
) -> None:
    vectors = [random(seed + i, size) * (1 if i % 2 else 1e-3) for i, size in enumerate(sizes)]
    if coarse:
        vectors = [(v * 2).round() for v in vectors]
    whole = torch.cat(vectors)
    cut = across(lambda: iter(vectors), density)
    chosen = [v[cut.take(v)] for v in vectors]
    k = min(kept(len(whole), density), int(whole.count_nonzero())) if len(whole) else 0
    assert sum(map(len, chosen)) == k and cut.ties == 0
    right = whole[largest(whole.abs(), k)]
    assert torch.equal(torch.cat(chosen), right)
    if k:
        assert cut.mean == pytest.approx(float(right.abs().double().mean()), rel=1e-6)
        assert cut.std == pytest.approx(float(whole.double().std(correction=0)), rel=1e-6, abs=1e-9)


@given(shape=shapes, seed=seeds, density=densities, turned=st.booleans())
@properties
def test_columns_and_rows_of_largest_norm_are_kept_as_they_are(shape: tuple[int, ...], seed: int, density: float, turned: bool) -> None:
    update = random(seed, *shape)
    made = (rows if turned else columns)(update, density)
    matrix, found = (t if t.ndim <= 3 else t.flatten(1) for t in (update, values(made)))
    if turned:
        matrix, found = matrix.mT, found.mT
    for m, f in zip(matrix.reshape(-1, *matrix.shape[-2:]), found.reshape(-1, *found.shape[-2:]), strict=True):
        norms = m.norm(dim=0)
        k = kept(len(norms), density)
        chosen = f.abs().sum(0) > 0
        assert int(chosen.sum()) == k and torch.equal(f[:, chosen], m[:, chosen])
        if 0 < k < len(norms):
            assert norms[chosen].min() >= norms[~chosen].max()


def test_random_entries_are_exactly_k_and_of_seed_and_name() -> None:
    update = random(0, 40, 30)
    one, again, other, named = (sparse(update, 0.1, "random", seed=s, name=n) for s, n in ((0, "a"), (0, "a"), (1, "a"), (0, "b")))
    assert torch.equal(one.positions, again.positions) and len(one.positions) == 120
    assert not torch.equal(one.positions, other.positions) and not torch.equal(one.positions, named.positions)


def test_rescaled_random_entries_are_right_on_average() -> None:
    """DARE: the expectation of the rescaled update is the update."""
    update = random(0, 6, 5)
    mean = sum(values(sparse(update, 0.2, "random", rescale=True, seed=seed)) for seed in range(2000)) / 2000
    torch.testing.assert_close(mean, update, rtol=0.3, atol=0.15)
    large = sparse(update, 0.2, rescale=True)
    assert float(values(large).abs().sum()) == pytest.approx(float(update.abs().sum()), rel=1e-5)
    assert torch.equal(large.values, update.flatten()[large.positions]), "the gain rescales; values stay what they were"


# low rank


@given(shape=st.one_of(st.tuples(st.integers(2, 12), st.integers(2, 12)), st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7))), seed=seeds, rank=st.integers(1, 13))
@properties
def test_the_error_of_the_truncated_decomposition_is_the_discarded_singular_values(shape: tuple[int, ...], seed: int, rank: int) -> None:
    update = random(seed, *shape)
    made = low_rank(update, rank)
    S = torch.linalg.svdvals(update.double())
    discarded = float(S[..., rank:].square().sum().sqrt())
    assert isinstance(made, LowRank) and made.rank == min(rank, *shape[-2:])
    assert float((values(made) - update).norm()) == pytest.approx(discarded, rel=1e-4, abs=1e-5)


@given(seed=seeds, energy=st.floats(0.05, 1), source=st.sampled_from(["dense", "factors"]))
@properties
def test_an_energy_takes_the_lowest_rank_that_keeps_it(seed: int, energy: float, source: str) -> None:
    factors = LowRank(random(seed, 12, 6), random(seed + 1, 6, 9), 0.5)
    update = values(factors) if source == "dense" else factors
    S = torch.linalg.svdvals(values(factors).double())
    shares = S.square().cumsum(0) / S.square().sum()
    made = low_rank(update, energy=energy)
    assert made.rank == min(int((shares < min(energy, 1 - 1e-9)).sum()) + 1, 6)
    assert relative_error(made, update) ** 2 <= 1 - energy + 1e-5


def test_experts_share_the_rank_that_the_most_demanding_needs() -> None:
    update = torch.stack([random(0, 8, 1) @ random(1, 1, 6), random(2, 8, 4) @ random(3, 4, 6)])
    made = low_rank(update, energy=1.0)
    assert made.rank == 4 and relative_error(made, update) < 1e-5


def test_the_randomised_decomposition_is_close_to_the_exact_one_on_decaying_spectra() -> None:
    U, V = torch.linalg.qr(random(0, 700, 700)).Q, torch.linalg.qr(random(1, 600, 600)).Q
    for decay in (0.97, 0.9, 0.7):
        update = U[:, :600] @ torch.diag(decay ** torch.arange(600.0)) @ V
        exact, other = (relative_error(low_rank(update, 20, method=m), update) for m in ("exact", "randomized"))
        assert exact <= other + 1e-6 and other <= 1.01 * exact + 1e-6
    again = low_rank(update, 20, method="randomized", name="x")
    assert torch.equal(again.B, low_rank(update, 20, method="randomized", name="x").B)
    found = low_rank(U[:, :600] @ torch.diag(0.9 ** torch.arange(600.0)) @ V, energy=0.999, method="randomized")
    assert found.rank == math.ceil(math.log(1e-3) / math.log(0.81))


# exact shortcuts

EXACT: dict[str, list[Update]] = {
    "dense": [Dense(random(0, 6, 5), 2.0)],
    "lowrank": [
        LowRank(random(0, 6, 2), random(1, 2, 5), 0.5),
        Columns(random(0, 6, 2), torch.tensor([0, 3]), 5, 2.0),
        Rows(random(0, 2, 5), torch.tensor([1, 4]), 6),
        Sum([LowRank(random(0, 6, 1), random(1, 1, 5)), Columns(random(2, 6, 1), torch.tensor([2]), 5)]),
    ],
    "sparse": [Sparse(random(0, 3), torch.tensor([1, 7, 20]), (6, 5), 2.0), Columns(random(0, 6, 2), torch.tensor([0, 3]), 5, 2.0)],
    "columns": [Columns(random(0, 6, 2), torch.tensor([0, 3]), 5, 2.0)],
    "rows": [Rows(random(0, 2, 5), torch.tensor([1, 4]), 6, 2.0)],
    "ternary": [Ternary.of(random(0, 6, 5).sign(), torch.tensor(0.5)), Golomb.of(random(0, 6, 5).sign() * (random(1, 6, 5) > 1), torch.tensor(0.5))],
    "quantized": [Sparse(random(0, 2), torch.tensor([1, 7]), (6, 5))],
}


@pytest.mark.parametrize("to", TARGETS)
def test_a_form_that_can_hold_the_update_holds_it_exactly(to: str) -> None:
    for update in EXACT[to]:
        made = fit(update, to, group=2, bits=1)
        assert relative_error(made, update) <= 1e-6
        torch.testing.assert_close(values(made, 6, 5), values(update, 6, 5), rtol=1e-6, atol=1e-7)
        if to != "quantized" and type(made) is type(update):
            assert made is update
    for update in EXACT["lowrank"]:
        assert fit(update, "lowrank", rank=2).rank <= 2
        assert relative_error(fit(update, "lowrank", rank=2), update) <= 1e-6


def test_factors_are_truncated_without_the_product() -> None:
    update = LowRank(random(0, 100_000, 8), random(1, 8, 100_000) * torch.arange(1, 9)[:, None], 0.5)  # dense: 40 GB
    made = low_rank(update, 3)
    assert made.rank == 3 and made.B.dtype == torch.float32
    S = torch.linalg.svdvals((torch.linalg.qr(update.B.double()).R @ torch.linalg.qr(update.A.double().T).R.T) * 0.5)
    found = torch.linalg.svdvals(torch.linalg.qr(made.B.double()).R @ torch.linalg.qr(made.A.double().T).R.T)
    torch.testing.assert_close(found, S[:3], rtol=1e-5, atol=1e-5)


def test_an_update_of_one_magnitude_is_ternary_exactly_and_others_as_well_as_they_can_be() -> None:
    update = random(0, 20, 30).sign() * (random(1, 20, 30) > 0.5) * 0.125
    assert relative_error(ternary(update), update) == 0.0
    update = random(2, 20, 30)
    best = relative_error(ternary(update), update)
    assert all(best <= relative_error(ternary(update, d / 100), update) + 1e-7 for d in range(1, 101))
    assert int(values(ternary(update, 0.3)).count_nonzero()) == 180


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_zeros_are_never_kept_so_that_an_update_of_one_magnitude_stays_exact(density: float) -> None:
    """A tenth is not zero: the mean of what is kept is that magnitude, whatever larger share is asked for."""
    update = torch.zeros(600)
    update[:60] = random(0, 60).sign() * 0.125
    update = update[torch.randperm(600, generator=torch.Generator().manual_seed(0))].reshape(20, 30)
    assert relative_error(ternary(update, density), update) == 0.0
    of_rows = Ternary.of(update.sign(), torch.rand(20, generator=torch.Generator().manual_seed(1)))
    assert ternary(of_rows, density) is of_rows, "what is ternary already is exact, whatever its scales"
    cut = across(lambda: iter([update.flatten(), torch.zeros(40)]), density)
    assert len(cut.take(update.flatten())) == 60 and cut.mean == pytest.approx(0.125)
    assert not len(across(lambda: iter([torch.zeros(9)]), density).take(torch.zeros(9)))


def test_quantizing_codes_matrices_and_values_and_leaves_the_rest() -> None:
    update = Magnitude(torch.rand(6), LowRank(random(0, 6, 4), random(1, 4, 5)))
    made = quantized(update, 8, 0)
    assert isinstance(made, Quantized) and torch.equal(made.tensors()["inner.magnitude"], update.magnitude)
    one = quantized(Columns(random(0, 60, 2), torch.tensor([0, 3]), 5), 4, 16)
    assert "inner.index" in one.tensors() and set(one.coded) == {"values"}
    assert quantized(made, 2, 0).bits == 2, "what is quantized already is decoded first"
    signs = Ternary.of(random(0, 6, 5).sign(), torch.tensor(0.5))
    assert quantized(signs) is signs


# refusals, and what is not a matrix


@pytest.mark.parametrize("to", TARGETS)
def test_an_update_that_depends_on_the_base_needs_it(to: str) -> None:
    weight = random(5, 6, 5)
    update = Replace(weight + random(0, 6, 2) @ random(1, 2, 5))
    options: dict[str, Any] = {"rank": 2} if to == "lowrank" else {"bits": 8, "group": 4} if to == "quantized" else {}
    with pytest.raises(EspalierError, match=r"the form 'replace' depends on the base; .*--model BASE"):
        fit(update, to, **options)
    made = fit(update, to, weight=weight, **options)
    assert not made.depends_on_base and relative_error(made, update, weight) < (0.7 if to == "ternary" else 0.05)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused_with_the_value(to: str, bad: float) -> None:
    update = random(0, 6, 5)
    update[2, 3] = bad
    with pytest.raises(EspalierError, match=r"the update is (nan|inf) at \(2, 3\); every number of it must be finite"):
        fit(update, to, rank=2, density=0.5)
    with pytest.raises(EspalierError, match="every number of it must be finite"):
        fit(LowRank(update, random(1, 5, 5)), to, rank=2, density=0.5)


@pytest.mark.parametrize("shape", [(7,), ()], ids=str)
@pytest.mark.parametrize("to", TARGETS)
def test_vectors_and_numbers_stay_dense_where_a_form_needs_a_matrix(to: str, shape: tuple[int, ...]) -> None:
    update = random(0, *shape)
    made = fit(update, to, rank=2, density=0.5)
    assert made.shape == shape and values(made, *shape).shape == shape
    if to in ("lowrank", "rows", "columns"):
        assert isinstance(made, Dense) and torch.equal(made.values, update)


@pytest.mark.parametrize(
    ("to", "options", "complaint"),
    [
        ("tucker", {}, "to is 'tucker'; it must be one of: dense, lowrank, sparse"),
        ("lowrank", {}, "needs --rank or --energy"),
        ("lowrank", {"rank": 0}, "rank is 0; it must be at least 1"),
        ("lowrank", {"energy": 1.5}, r"energy is 1\.5"),
        ("sparse", {"density": -0.1}, r"density is -0\.1; it must be from 0 to 1"),
        ("columns", {"density": math.nan}, "density is nan"),
        ("quantized", {"bits": 9}, "bits is 9"),
        ("quantized", {"group": -1}, "group is -1"),
    ],
)
def test_options_out_of_range_are_refused(to: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        fit(random(0, 6, 5), to, **options)


def test_the_relative_error_is_of_frobenius_norms() -> None:
    update = random(0, 6, 5)
    assert relative_error(update * 1.5, update) == pytest.approx(0.5)
    assert relative_error(dense(update), update) == 0.0
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == pytest.approx(2.0)
    assert dense(update, torch.bfloat16).dtype == torch.bfloat16


def test_the_factors_of_16_bit_updates_are_theirs_to_the_precision_of_float32() -> None:
    def half(seed: int, *shape: int) -> torch.Tensor:
        return random(seed, *shape, dtype=torch.bfloat16)

    a, b = LowRank(half(0, 40, 2), half(1, 2, 30), 1 / 3), LowRank(half(2, 40, 3), half(3, 3, 30), 0.7)
    for update in (Sum([a, b], 0.9), Kronecker(half(4, 1, 8, 2), half(5, 1, 5, 3), 1 / 3, A_in=half(6, 1, 2, 6), B_in=half(7, 1, 3, 5))):
        assert update.low_rank() is not None and relative_error(low_rank(update), update) < 1e-6
