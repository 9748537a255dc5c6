"""task_arithmetic, ties, dare, della, breadcrumbs and sce against their equations in float64."""

from __future__ import annotations

import pytest
import torch
from mergers import merge, merge_all, random

from espalier.delta import merging
from espalier.errors import EspalierError

BASE = random(0, 30, 20)
CHANGES = [0.2 * random(i, 30, 20) for i in (1, 2, 3)]
MODELS = [BASE + change for change in CHANGES]
ZERO = torch.zeros(30, 20)


def near(made: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(made.double(), expected.double(), rtol=1e-5, atol=tolerance)


def exact(changes: list[torch.Tensor]) -> list[torch.Tensor]:
    """The changes that a merge sees: a model minus the base, in float32."""
    return [(model - BASE).double() for model in [BASE + change for change in changes]]


def top(change: torch.Tensor, count: int) -> torch.Tensor:
    """The largest magnitudes of a vector, of equal ones the first; zeros elsewhere."""
    places = sorted(range(change.numel()), key=lambda i: (-abs(float(change.flatten()[i])), i))[:count]
    made = torch.zeros_like(change).flatten()
    made[places] = change.flatten()[places]
    return made.view(change.shape)


def elected(kept: list[torch.Tensor], weights: list[float], majority: str = "mass", mean: bool = True) -> torch.Tensor:
    votes = sum(w * k if majority == "mass" else (w * k).sign() for w, k in zip(weights, kept, strict=True))
    sign = torch.where(votes >= 0, 1.0, -1.0)
    agrees = [(w * k).sign() == sign for w, k in zip(weights, kept, strict=True)]
    total = sum(w * k * a for w, k, a in zip(weights, kept, agrees, strict=True))
    divisor = sum(w * a.double() for w, a in zip(weights, agrees, strict=True))
    return total / torch.where(divisor == 0, 1.0, divisor) if mean else total


# task arithmetic


def test_task_arithmetic_adds_weighted_changes() -> None:
    weights = [0.5, -1.0, 2.0]
    expected = BASE.double() + 0.3 * sum(w * c for w, c in zip(weights, exact(CHANGES), strict=True))
    near(merge("task_arithmetic", BASE, MODELS, weights=weights, scale=0.3), expected)
    near(merge("task_arithmetic", BASE, MODELS[:1]), MODELS[0])
    forgotten = merge("task_arithmetic", BASE, MODELS[:1], weights=[-1.0])
    near(forgotten, 2 * BASE - MODELS[0])


# TIES


@pytest.mark.parametrize("majority", ["mass", "count"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(density: float, majority: str, normalize: bool) -> None:
    weights = [0.5, 1.0, 1.5]
    kept = [top(change, max(1, int(600 * density))) for change in exact(CHANGES)]
    expected = BASE.double() + 0.7 * elected(kept, weights, majority, normalize)
    near(merge("ties", BASE, MODELS, weights=weights, scale=0.7, density=density, majority=majority, normalize=normalize), expected)


def test_ties_of_one_model_is_its_trimmed_change_with_the_exact_count() -> None:
    for density in (0.0, 0.013, 0.5, 0.999):
        made = merge("ties", ZERO, CHANGES[:1], density=density)
        assert int(made.count_nonzero()) == (max(1, int(600 * density)) if density else 0)
        assert torch.equal(made, top(CHANGES[0], int(made.count_nonzero())))


@pytest.mark.parametrize("piece", [1 << 17, 40])
def test_of_equal_magnitudes_in_bf16_the_first_are_kept(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "PIECE", piece)
    monkeypatch.setattr(merging, "SAMPLE", 64)
    change = (random(4, 60, 20) / 8).bfloat16().mul(32).round().div(32).float()  # about twenty distinct magnitudes
    for density in (0.05, 0.3, 0.7, 0.95):
        made = merge("ties", torch.zeros(60, 20), [change], density=density)
        assert torch.equal(made, top(change, int(1200 * density)))


def test_every_number_of_ties_has_the_elected_sign_and_a_cancelled_pair_is_positive() -> None:
    made = merge("ties", ZERO, CHANGES, density=1.0)
    votes = sum(CHANGES)
    assert torch.equal(made.sign(), votes.sign())
    assert torch.equal(merge("ties", ZERO, [CHANGES[0], -CHANGES[0]], density=1.0), CHANGES[0].abs())


def test_a_density_for_each_model_and_one_outside_its_range() -> None:
    kept = [top(c, n) for c, n in zip(exact(CHANGES), (60, 300, 600), strict=True)]
    near(merge("ties", BASE, MODELS, density=[0.1, 0.5, 1.0]), BASE.double() + elected(kept, [1.0, 1.0, 1.0]))
    with pytest.raises(EspalierError, match=r"density is 1.5; it must be from 0 to 1"):
        merge("ties", BASE, MODELS, density=1.5)
    with pytest.raises(EspalierError, match="density has 2 values; there are 3 models"):
        merge("ties", BASE, MODELS, density=[0.5, 0.5])


# DARE


def test_dare_is_the_change_on_average() -> None:
    """E[m tau / p] = tau."""
    made = torch.stack([merge("dare", ZERO, CHANGES[:1], density=0.3, seed=seed) for seed in range(2000)])
    deviation = (made.mean(0) - CHANGES[0]).abs()
    error = CHANGES[0].abs() * (0.7 / 0.3 / 2000) ** 0.5
    assert bool((deviation < 5 * error + 1e-7).all())
    kept = made.count_nonzero() / made.numel()
    assert float(kept) == pytest.approx(0.3, abs=4 * (0.21 / made.numel()) ** 0.5)
    assert torch.allclose(made[made != 0], (CHANGES[0] / 0.3).expand_as(made)[made != 0])


def test_the_mask_of_dare_depends_on_seed_name_and_place_alone() -> None:
    def mask(name: str, change: torch.Tensor, seed: int = 0, **options: object) -> torch.Tensor:
        return merge_all("dare", {name: torch.zeros_like(change)}, [{name: change}], seed=seed, density=0.5, **options)[name] != 0

    first = mask("a", CHANGES[0])
    assert torch.equal(first, mask("a", CHANGES[1])) and torch.equal(first, mask("a", CHANGES[0], rescale="none"))
    assert torch.equal(first.flatten(), mask("a", CHANGES[0].reshape(20, 30)).flatten())
    assert not torch.equal(first, mask("b", CHANGES[0])) and not torch.equal(first, mask("a", CHANGES[0], seed=1))


def test_the_models_of_dare_have_masks_of_their_own() -> None:
    one, both = merge("dare", ZERO, CHANGES[:1]), merge("dare", ZERO, [CHANGES[0], CHANGES[0]])
    assert not torch.equal(2 * one, both)


def test_dare_at_the_ends() -> None:
    near(merge("dare", BASE, MODELS, density=1.0), merge("task_arithmetic", BASE, MODELS))
    assert torch.equal(merge("dare", BASE, MODELS, density=0.0), BASE)
    near(merge("dare", BASE, MODELS, density=1.0, elect="mass"), merge("ties", BASE, MODELS, density=1.0))
    with pytest.raises(EspalierError, match=r"density is -0.1"):
        merge("dare", BASE, MODELS, density=-0.1)


def test_dare_rescaled_by_the_norm_keeps_the_sum_of_magnitudes() -> None:
    made = merge("dare", ZERO, CHANGES[:1], density=0.4, rescale="norm")
    assert float(made.abs().sum()) == pytest.approx(float(CHANGES[0].abs().sum()), rel=1e-5)


def test_dare_with_an_election_merges_as_ties_does() -> None:
    kept = [merge("dare", ZERO, [ZERO] * i + [c], density=0.5).double() for i, c in enumerate(CHANGES)]
    near(merge("dare", ZERO, CHANGES, density=0.5, elect="mass"), elected(kept, [1.0] * 3))


# DELLA


def test_della_is_the_change_on_average_and_keeps_large_ones_more_often() -> None:
    made = torch.stack([merge("della", ZERO, CHANGES[:1], density=0.5, epsilon=0.3, elect="none", seed=s) for s in range(2000)])
    ranks = CHANGES[0].abs().argsort(-1).argsort(-1)
    odds = 0.2 + 0.6 * ranks / 19
    error = CHANGES[0].abs() * ((1 - odds) / odds / 2000) ** 0.5
    assert bool(((made.mean(0) - CHANGES[0]).abs() < 5 * error + 1e-7).all())
    seen = (made != 0).double().mean(0)
    assert bool(((seen - odds).abs() < 5 * (odds * (1 - odds) / 2000) ** 0.5).all())


def test_della_with_epsilon_zero_is_dare() -> None:
    for elect in ("none", "mass"):
        assert torch.equal(merge("della", BASE, MODELS, epsilon=0.0, elect=elect), merge("dare", BASE, MODELS, elect=elect))


def test_della_of_rows_of_one_number_keeps_with_the_density() -> None:
    change = random(5, 4000, 1)
    made = merge("della", torch.zeros(4000, 1), [change], density=0.3, epsilon=0.2)
    assert float((made != 0).double().mean()) == pytest.approx(0.3, abs=0.03)


def test_della_refuses_probabilities_that_are_none() -> None:
    for density, epsilon in ((0.1, 0.1), (0.9, 0.2), (1.1, 0.0), (0.5, -0.1)):
        with pytest.raises(EspalierError, match=rf"density {density} and epsilon {epsilon}"):
            merge("della", BASE, MODELS, density=density, epsilon=epsilon)


# breadcrumbs


@pytest.mark.parametrize(("density", "gamma"), [(0.1, 0.05), (0.5, 0.1), (0.9, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_breadcrumbs_keeps_the_middle(density: float, gamma: float, per: str) -> None:
    def kept(change: torch.Tensor) -> torch.Tensor:
        count = int(change.numel() * density)
        outliers = min(int(change.numel() * gamma), change.numel() - count)
        return top(change, count + outliers) - top(change, outliers)

    masked = [torch.stack([kept(row) for row in c]) if per == "row" else kept(c) for c in exact(CHANGES)]
    near(merge("breadcrumbs", BASE, MODELS, density=density, gamma=gamma, per=per, scale=0.3), BASE.double() + 0.3 * sum(masked))


def test_breadcrumbs_counts_in_every_row_also_where_numbers_are_equal() -> None:
    change = (random(4, 30, 100) * 2).round() / 2 + 0.25
    made = merge("breadcrumbs", torch.zeros(30, 100), [change], density=0.2, gamma=0.1)
    assert made.count_nonzero(-1).tolist() == [20] * 30
    limit = change.abs().sort(-1).values[:, 89:90]
    assert bool((made.abs() <= limit).all())


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_breadcrumbs_does_not_wipe_tiny_tensors(per: str) -> None:
    change = torch.tensor([0.3, -0.1, 0.2, 0.05, -0.4, 0.25, 0.6])
    made = merge("breadcrumbs", torch.zeros(7), [change], density=0.5, gamma=0.01, per=per)
    assert torch.equal(made, top(change, 3))
    one = merge("breadcrumbs", torch.zeros(1), [change[:1]], per=per)
    assert torch.equal(one, change[:1]), "at least one is kept"


# SCE


def sce_of(changes: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    stacked = torch.stack(changes)
    spread = ((stacked - stacked.mean(0)) ** 2).mean(0)
    if density < 1:
        count = int(int((spread > 1e-16).sum()) * density)
        stacked = stacked * (top(spread, count) != 0)
    energy = torch.tensor(weights, dtype=torch.float64) * stacked.flatten(1).square().sum(1)
    eta = energy / energy.sum()
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    shares = eta[:, None, None] * (stacked.sign() == sign)
    total = shares.sum(0)
    return (stacked * shares).sum(0) / torch.where(total == 0, 1.0, total)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_selects_calculates_and_erases(density: float) -> None:
    weights = [1.0, 0.5, 2.0]
    expected = BASE.double() + 0.5 * sce_of(exact(CHANGES), weights, density)
    near(merge("sce", BASE, MODELS, weights=weights, density=density, scale=0.5), expected)


def test_sce_of_changes_with_one_sign_is_the_energy_weighted_mean() -> None:
    positive = [change.abs() for change in CHANGES]
    energy = torch.stack([c.double().square().sum() for c in positive])
    expected = sum(e * c for e, c in zip(energy / energy.sum(), positive, strict=True))
    near(merge("sce", ZERO, positive), expected)


def test_sce_counts_only_places_that_vary_and_gives_a_zero_change_no_weight() -> None:
    changes = [c.clone() for c in CHANGES[:2]]
    changes[1][:15] = changes[0][:15]
    made = merge("sce", ZERO, changes, density=0.5)
    assert int(made.count_nonzero()) == 150 and not bool(made[:15].any())
    near(merge("sce", ZERO, [CHANGES[0], ZERO]), CHANGES[0])
