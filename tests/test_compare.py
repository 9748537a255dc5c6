"""Two deltas side by side: every number against plain dense arithmetic in float64, and against known angles."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conformance.test_forms import ENTRIES, deep_shapes, gains, make, random, seeds
from families import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import compare, store
from espalier.delta.algebra import add, negate, scale
from espalier.delta.compare import conflicts, cosine, equal, inner, norm
from espalier.delta.fit import fit
from espalier.delta.forms import Columns, Dense, Diagonal, LowRank, Replace, Sparse, Update
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError
from espalier.exchange.conversion import BaseWeights
from espalier.kernels.philox import Stream

BASE = {"base": {"name": "x", "fingerprint": "sha256:0"}, "method": "made"}
properties = settings(deadline=None, max_examples=150)
entries = st.sampled_from(list(ENTRIES))


def delta(updates: dict[str, Update], **manifest: Any) -> Delta:
    return Delta(updates, {name: Layout((name,)) for name in updates}, {**BASE, **manifest})


def low_rank(seed: int, outputs: int = 12, inputs: int = 10, rank: int = 2) -> LowRank:
    return LowRank(random(seed, outputs, rank), random(seed + 1, rank, inputs))


def given_weight(weight: torch.Tensor) -> Any:
    return lambda name, layout, shape: weight.reshape(shape)


def refused(*said: str) -> Any:
    return pytest.raises(EspalierError, match=".*".join(map(re.escape, said)))


@pytest.fixture(params=[1 << 20, 7], ids=["whole", "slices"], scope="module", autouse=True)
def slices(request: pytest.FixtureRequest) -> Any:
    """Every test runs with parameters that are one slice, and with slices of a row or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SLICE", request.param)
        yield


# norms and angles


@properties
@given(names=st.tuples(entries, entries), shape=deep_shapes, seed=seeds, gain=gains)
def test_norms_inner_products_and_cosines_of_any_forms_are_those_of_the_dense_updates(
    names: tuple[str, str], shape: tuple[int, ...], seed: int, gain: float
) -> None:
    weight = random(seed + 9, *shape)
    (one, eq_one), (two, eq_two) = (make(name, shape, seed + i, gain) for i, name in enumerate(names))
    x, y = (equation(weight.double()) - weight.double() for equation in (eq_one, eq_two))
    a, b, weights = delta({"w": one}), delta({"w": two}), given_weight(weight)
    sizes, product = (float(x.norm()), float(y.norm())), float((x * y).sum())
    slack = 1e-5 * max(1.0, float(weight.norm()))  # a change is known no better than the weight that it is made of
    assert norm(a, weights).total == pytest.approx(sizes[0], rel=1e-5, abs=slack)
    assert norm(b, weights).parameters["w"] == pytest.approx(sizes[1], rel=1e-5, abs=slack)
    slack *= 1 + sizes[0] + sizes[1]
    assert inner(a, b, weights).total == pytest.approx(product, rel=1e-5, abs=slack)
    if min(sizes) > 1e-2:
        found = cosine(a, b, weights)
        assert found.total == found.parameters["w"] == pytest.approx(product / sizes[0] / sizes[1], abs=slack / sizes[0] / sizes[1])
        assert cosine(a, a, weights).total == pytest.approx(1, abs=1e-12) and cosine(a, turned(a), weights).total == pytest.approx(-1, abs=1e-5)


def turned(one: Delta) -> Delta:
    """The other way, and twice as far: by the gains, which what sets values has too."""
    return Delta({name: update.scaled(-2.0) for name, update in one.updates.items()}, one.layouts, one.manifest)


def test_totals_run_over_all_parameters_and_one_that_is_missing_is_zero() -> None:
    u, v, w = (low_rank(seed) for seed in (0, 2, 4))
    a, b = delta({"u": u, "v": v}), delta({"v": w, "x": u})
    x, y = (torch.stack([t.materialize(torch.zeros(1)).double() if t else torch.zeros(12, 10).double() for t in row]) for row in ((u, v, None), (None, w, u)))
    assert norm(a).total == pytest.approx(float(x.norm()), rel=1e-6)
    assert inner(a, b).total == pytest.approx(float((x * y).sum()), rel=1e-5) and list(inner(a, b).parameters) == ["v"]
    assert cosine(a, b).total == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-5)


def test_the_norm_of_what_cancels_is_zero_to_rounding() -> None:
    one = delta({"w": low_rank(0)})
    assert norm(add(one, negate(one))).total < 1e-13 * norm(one).total


def test_a_cosine_with_zero_is_none() -> None:
    zero, one = delta({"w": Dense(torch.zeros(12, 10))}), delta({"w": low_rank(0)})
    assert cosine(zero, one).total is None and cosine(zero, one).parameters == {"w": None} and norm(zero).total == 0
    assert conflicts(zero, one)["w"].jaccard == 0 and conflicts(zero, zero)["w"].jaccard is None


def test_factors_and_positions_are_enough_for_parameters_that_no_memory_holds() -> None:
    size = 1 << 20  # 8 TiB as a dense update in float64
    a, b = (delta({"w": low_rank(seed, size, size)}) for seed in (0, 2))
    x, y = a.updates["w"], b.updates["w"]
    gram = ((x.B.double().T @ y.B.double()) * (x.A.double() @ y.A.double().T)).sum()  # type: ignore[attr-defined]
    assert inner(a, b).total == pytest.approx(float(gram), rel=1e-9) and 0 < cosine(a, a).total <= 1  # type: ignore[operator]
    here, there = (torch.arange(start, 10**6, step) * 10**6 for start, step in ((0, 2), (0, 3)))
    one = delta({"w": Sparse(torch.ones(len(here)), here, (size, size), 2.0)})
    two = delta({"w": Sparse(-torch.ones(len(there)), there, (size, size))})
    common = len(set(here.tolist()) & set(there.tolist()))
    assert inner(one, two).total == -2 * common
    found = conflicts(one, two)["w"]
    assert found.jaccard == common / (len(here) + len(there) - common) and found.sign_agreement == 0
    assert found.density_a == len(here) / size**2
    assert found.a_in_b == common / len(here) and found.b_in_a == common / len(there)


def test_two_random_supports_meet_as_often_as_chance_has_it() -> None:
    """Overlap of independent random supports converges to the other's density."""
    entries = 300 * 400
    supports = [Stream(seed, "support").choice(entries, count) for seed, count in ((0, entries // 10), (1, entries // 4))]
    found = conflicts(*(delta({"w": Sparse(torch.ones(len(s)), s, (300, 400))}) for s in supports))["w"]
    assert found.a_in_b == pytest.approx(found.density_b, abs=0.02) and found.b_in_a == pytest.approx(found.density_a, abs=0.01)
    assert (found.density_a, found.density_b) == (0.1, 0.25)


# equality


@properties
@given(name=entries, shape=deep_shapes, seed=seeds, gain=gains)
def test_a_delta_equals_itself_whatever_its_form_without_the_base_and_no_longer_once_an_entry_moves(
    name: str, shape: tuple[int, ...], seed: int, gain: float
) -> None:
    assume(gain)
    one, same = (delta({"w": make(name, shape, seed, gain)[0]}) for _ in range(2))
    assert equal(one, same)
    weight = random(seed + 9, *shape)
    dense = one.updates["w"].materialize(weight.double())
    weights = given_weight(weight)
    assert equal(one, delta({"w": Dense(dense.clone())}), 1e-6, weights), "in another form"
    moved = dense.flatten()
    moved[seed % len(moved)] += 1 + dense.norm()
    moved = moved.reshape(shape)
    assert not equal(one, delta({"w": Dense(moved)}), 1e-6, weights) and not equal(one, delta({"w": Dense(moved)}), 0.0, weights)


def test_equality_is_of_the_update_not_of_its_spelling() -> None:
    values = random(0, 30)
    at_index = Sparse(values, torch.arange(0, 120, 4), (12, 10), 2.0)
    at_mask, as_dense = fit(at_index, "sparse", density=1.0), fit(at_index, "dense")
    assert equal(delta({"w": at_index}), delta({"w": at_mask})) and equal(delta({"w": at_index}), delta({"w": as_dense}))
    assert equal(delta({"w": at_index}), delta({"w": at_index, "v": Dense(torch.zeros(3))})), "an update that is zero is none"
    assert not equal(delta({"w": at_index}), delta({"w": at_index, "v": Dense(torch.ones(3))}))
    assert not equal(delta({"w": at_index}), delta({"w": at_index}, removed=["old"]))
    assert equal(delta({"w": low_rank(0)}), scale(delta({"w": low_rank(0)}), 1 + 1e-7), 1e-6)
    whole = [Delta({"w": Replace(torch.full((2,), i))}, {"w": Layout((), dtype="I64")}, dict(BASE)) for i in (1, 2)]
    assert equal(whole[0], whole[0]) and not equal(*whole)


# conflicts


@properties
@given(names=st.tuples(entries, entries), shape=deep_shapes, seed=seeds)
def test_supports_and_signs_are_counted_as_in_the_dense_updates(names: tuple[str, str], shape: tuple[int, ...], seed: int) -> None:
    weight = random(seed + 9, *shape)
    a, b = (delta({"w": make(name, shape, seed + i)[0]}) for i, name in enumerate(names))
    x, y = (d.updates["w"].materialize(weight.double()).numpy().ravel() for d in (a, b))
    found = conflicts(a, b, given_weight(weight))["w"]
    both = [(s > 0) == (t > 0) for s, t in zip(x.tolist(), y.tolist(), strict=True) if s and t]
    either = sum(bool(s or t) for s, t in zip(x.tolist(), y.tolist(), strict=True))
    # an entry that is zero but for rounding may be one or the other in slices
    near = pytest.approx if not any("block" in n or "magnitude" in n or "factored" in n or "sum" in n or "subspace" in n for n in names) else lambda value: pytest.approx(value, abs=1.5)
    assert found.density_a * x.size == near(numpy.count_nonzero(x)) and found.density_b * x.size == near(numpy.count_nonzero(y))
    if near is pytest.approx:
        assert found.jaccard == (pytest.approx(len(both) / either) if either else None)
        assert found.sign_agreement == (pytest.approx(sum(both) / len(both)) if both else None)
    assert found.norm_a == pytest.approx(float(numpy.linalg.norm(x)), rel=1e-5, abs=1e-5)
    assert json.loads(json.dumps(found.as_json()))["norm_b"] == found.norm_b
    for angles in (found.column_angles, found.row_angles):
        assert angles is None or all(0 <= t <= math.pi / 2 + 1e-12 for one in angles for t in one)


@pytest.mark.parametrize("angles", [(0.0, 1.0), (1e-9, 0.3), (1e-5, math.pi / 4, math.pi / 2), (math.pi / 2 - 1e-7, 1.5), (0.7,)])
def test_principal_angles_are_those_that_the_subspaces_were_made_with(angles: tuple[float, ...]) -> None:
    """Also those of 1e-9, whose cosine rounds to 1 in float64: Bjorck and Golub's sines see them."""
    k, n = len(angles), 40
    Q = torch.linalg.qr(random(0, n, 2 * k).double()).Q
    turn = torch.tensor(angles, dtype=torch.float64)
    first, second = Q[:, :k], Q[:, :k] * turn.cos() + Q[:, k:] * turn.sin()
    mixed = [basis @ (random(seed, k, k).double() + 3 * torch.eye(k)) for seed, basis in ((1, first), (2, second))]
    other = random(3, k, 30).double()
    found = conflicts(delta({"w": LowRank(mixed[0], other)}), delta({"w": LowRank(mixed[1], other)}))["w"]
    assert found.column_angles == [pytest.approx(sorted(angles), abs=1e-13)] and found.row_angles == [pytest.approx([0] * k, abs=1e-13)]
    transposed = conflicts(delta({"w": LowRank(other.T, mixed[0].T)}), delta({"w": LowRank(other.T, mixed[1].T)}))["w"]
    assert transposed.row_angles == [pytest.approx(sorted(angles), abs=1e-13)]


@properties
@given(ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)), experts=st.integers(1, 3), seed=seeds)
def test_principal_angles_of_other_ranks_and_experts_are_those_of_the_projectors(ranks: tuple[int, int], experts: int, seed: int) -> None:
    """Independently: cos^2 of the angles are the largest eigenvalues of P_a P_b P_a."""
    a, b = (LowRank(random(seed + i, experts, 16, r), random(seed + 5 + i, experts, r, 14)) for i, r in enumerate(ranks))
    found = conflicts(delta({"w": a}), delta({"w": b}))["w"]
    assert found.column_angles is not None and len(found.column_angles) == experts
    for e in range(experts):
        projectors = [B @ numpy.linalg.pinv(B) for B in (a.B[e].double().numpy(), b.B[e].double().numpy())]
        squares = numpy.linalg.eigvalsh(projectors[0] @ projectors[1] @ projectors[0])[::-1][: min(ranks)]
        expected = numpy.arccos(numpy.sqrt(squares.clip(0, 1)))
        assert found.column_angles[e] == pytest.approx(expected.tolist(), abs=1e-6)


def test_spaces_are_of_the_product_not_of_its_factors_and_a_zero_update_has_none() -> None:
    B, A = random(0, 16, 3), random(1, 3, 14)
    B[:, 2] = 2 * B[:, 0]  # of rank 2
    other = delta({"w": LowRank(random(2, 16, 3), random(3, 3, 14))})
    assert len(conflicts(delta({"w": LowRank(B, A)}), other)["w"].column_angles[0]) == 2  # type: ignore[index]
    assert conflicts(delta({"w": LowRank(torch.zeros(16, 3), A)}), other)["w"].column_angles == [[]]
    columns = delta({"w": Columns(random(0, 16, 2), torch.tensor([1, 5]), 14)})
    assert conflicts(columns, other)["w"].column_angles is None, "single columns are no fitted subspace"


# the base, and refusals


def test_updates_that_depend_on_the_base_are_read_from_the_model_on_disk(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    directory, name = ModelDirectory(tmp_path / "base"), "model.layers.0.mlp.up_proj.weight"
    weight = directory.read(name)
    shape = tuple(weight.shape)
    one = delta({name: Diagonal(random(0, shape[0]), None, shape)}, base={"name": "base", "fingerprint": directory.fingerprint()})
    store.save(tmp_path / "d", one, "")
    loaded = store.load(tmp_path / "d", mapped=True)
    weights = BaseWeights(loaded, tmp_path / "d", str(tmp_path / "base"))
    exact = (random(0, shape[0]).double() - 1)[:, None] * weight.double()
    assert norm(loaded, weights).total == pytest.approx(float(exact.norm()), rel=1e-6)


def test_without_the_base_what_depends_on_it_is_refused_by_name() -> None:
    one = delta({"w": Diagonal(random(0, 12), None, (12, 10))})
    for measure in (lambda: norm(one), lambda: cosine(one, delta({"w": low_rank(0)})), lambda: conflicts(one, one), lambda: equal(one, delta({"w": low_rank(0)}))):
        with refused("w: the form 'diagonal' depends on the base; pass weights="):
            measure()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    broken = low_rank(0)
    broken.A[1, 3] = bad
    good, one = delta({"w": low_rank(0)}), delta({"w": broken})
    for measure in (lambda: norm(one), lambda: inner(good, one), lambda: conflicts(one, good), lambda: equal(one, one)):
        with refused("w: A of the update holds", str(bad)):
            measure()
    huge = [torch.full(shape, 1e200, dtype=torch.float64) for shape in ((12, 2), (2, 10))]
    for update in (LowRank(*huge), LowRank(low_rank(0).B, low_rank(0).A, bad)):
        with refused("w: the dense update or a sum over it is not finite"):
            norm(delta({"w": update}))
    weight = torch.full((12, 10), bad)
    with refused("w: the dense update"):
        norm(delta({"w": Diagonal(random(0, 12), None, (12, 10))}), given_weight(weight))


def test_deltas_that_cannot_be_compared_are_refused() -> None:
    one = delta({"w": low_rank(0)})
    with refused("different bases", "sha256:0", "sha256:1"):
        cosine(one, delta({"w": low_rank(0)}, base={"fingerprint": "sha256:1"}))
    with refused("w: the deltas hold it in different layouts"):
        equal(one, Delta(one.updates, {"w": Layout((), transposed=True)}, dict(BASE)))
    with refused("w: the deltas hold updates of different shapes"):
        conflicts(one, delta({"w": low_rank(0, 13)}))
    with refused("w: the tensor is set as a whole (F32)", "algebra.restrict"):
        norm(Delta({"w": Replace(torch.ones(3))}, {"w": Layout((), dtype="F32")}, dict(BASE)))
