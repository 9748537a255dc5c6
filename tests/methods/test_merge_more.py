"""nearswap, wise_ft, sparse_soup, metrics_weighted, fisher, regmean and opcm: the properties that their papers name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergers import merge, merge_all, random

from espalier.calibrate import store as calibrations
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.errors import EspalierError
from espalier.verbs.calibrate import calibrate
from espalier.verbs.merge import merge as merge_models

BASE = random(0, 24, 16)
MODELS = [BASE + 0.2 * random(i, 24, 16) for i in (1, 2, 3)]
ZERO = torch.zeros(24, 16)


def near(made: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(made.double(), expected.double(), rtol=1e-5, atol=tolerance)


# nearswap and WiSE-FT


def test_nearswap_is_the_interpolation_that_others_write() -> None:
    for t in (1e-3, 0.1, 10.0):
        change = (MODELS[0] - BASE).double()
        near(merge("nearswap", BASE, MODELS[:1], t=t), BASE.double() + (t / change.abs()).clamp(0, 1) * change)
    with pytest.raises(EspalierError, match="takes one model beside the base, there are 2"):
        merge("nearswap", BASE, MODELS[:2])


def test_wise_ft_has_its_ends_at_base_and_model() -> None:
    assert torch.equal(merge("wise_ft", BASE, MODELS[:1], alpha=0.0), BASE)
    near(merge("wise_ft", BASE, MODELS[:1], alpha=1.0), MODELS[0])
    near(merge("wise_ft", BASE, MODELS[:1], alpha=0.3), 0.7 * BASE.double() + 0.3 * MODELS[0].double())
    with pytest.raises(EspalierError, match="between the base and one model, there are 2"):
        merge("wise_ft", BASE, MODELS[:2])


# sparse soups


def test_the_soup_of_models_with_one_mask_is_as_sparse_as_they_are() -> None:
    mask = random(9, 24, 16) > 1
    made = merge("sparse_soup", None, [model * mask for model in MODELS])
    assert torch.equal(made != 0, mask)
    near(made, mask * sum(model.double() for model in MODELS) / 3)


def test_models_with_other_masks_are_refused_and_stray_zeros_are_not() -> None:
    masked = [model * (random(i, 24, 16) > 1) for i, model in enumerate(MODELS)]
    with pytest.raises(EspalierError, match=r"not in the same places in all models: \d+ of 384 numbers .* retrain with one mask"):
        merge("sparse_soup", None, masked)
    stray = MODELS[0].clone()
    stray[0, 0] = 0.0
    near(merge("sparse_soup", None, [stray, MODELS[1]]), (stray + MODELS[1]).double() / 2)


# metrics-weighted averaging


def weights_of(metrics: list[float], **options: Any) -> torch.Tensor:
    """The weights, from the mean of one-hot models."""
    return merge("metrics_weighted", None, list(torch.eye(len(metrics))), metrics=metrics, **options)


def test_metrics_are_weights() -> None:
    losses = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)
    near(weights_of(losses.tolist(), power=2.0), losses**-2 / (losses**-2).sum())
    near(weights_of(losses.tolist(), power=0.5, better="higher"), losses**0.5 / (losses**0.5).sum())


def test_equal_metrics_or_power_zero_are_the_uniform_mean_and_more_power_prefers_the_best() -> None:
    third = torch.full((3,), 1 / 3)
    near(weights_of([2.0, 2.0, 2.0], power=5.0), third)
    near(weights_of([2.0, 1.0, 4.0], power=0.0), third)
    best = [float(weights_of([2.0, 1.0, 4.0], power=p)[1]) for p in (0.0, 0.5, 1.0, 4.0, 5000.0)]
    assert best == sorted(best) and best[-1] == 1.0


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [(None, "needs a metric of every model"), ([1.0], "metrics has 1 values; there are 3 models"), ([1.0, 0.0, 2.0], "must be above 0")],
)
def test_metrics_that_are_none_are_refused(metrics: list[float] | None, complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        merge("metrics_weighted", None, MODELS, metrics=metrics)


# Fisher and RegMean


def calibration(path: Path, fisher: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], tokens: int = 50, sequences: int = 4) -> str:
    facts = {
        "format": 1,
        "request": {"want": ["second_moment", "fisher"], "rank": 1},
        "sequences": sequences,
        "places": {"input": {f"{n} in": [len(m)] for n, m in moments.items()}, "gradient": {n: list(f.shape) for n, f in fisher.items()}},
        "sites": {n: f"{n} in" for n in moments},
        "coverage": {f"{n} in": [tokens] for n in moments},
    }
    made = {f"{n}:fisher": f.double() for n, f in fisher.items()} | {f"{n} in:second_moment": m.double() for n, m in moments.items()}
    write_safetensors(path.with_suffix(".raw"), made)
    calibrations.write(path, facts, dict.fromkeys(made, SafetensorsFile(path.with_suffix(".raw"))))
    return str(path)


def fishers(folder: Path, *tensors: torch.Tensor) -> list[str]:
    return [calibration(folder / f"{i}.calibration", {"w": t}, {}) for i, t in enumerate(tensors)]


def test_fisher_weighs_number_by_number(tmp_path: Path) -> None:
    F = [random(i, 24, 16).square() for i in (7, 8, 9)]
    weights = [0.5, 1.0, 2.0]
    shares = [w * (f.double() / 4).clamp_min(1e-6) for w, f in zip(weights, F, strict=True)]
    expected = sum(s * m.double() for s, m in zip(shares, MODELS, strict=True)) / sum(shares)
    near(merge("fisher", None, MODELS, weights=weights, statistics=fishers(tmp_path, *F)), expected)
    norms = [f.double().norm() for f in F]
    shares = [(f.double() / n).clamp_min(1e-6) for f, n in zip(F, norms, strict=True)]
    expected = sum(s * m.double() for s, m in zip(shares, MODELS, strict=True)) / sum(shares)
    near(merge("fisher", None, MODELS, statistics=fishers(tmp_path, *F), normalize=True), expected)


def test_equal_information_gives_the_mean_and_an_overwhelming_one_its_model(tmp_path: Path) -> None:
    F = random(7, 24, 16).square()
    near(merge("fisher", None, MODELS, statistics=fishers(tmp_path, F, F, F)), sum(m.double() for m in MODELS) / 3)
    near(merge("fisher", None, MODELS, statistics=fishers(tmp_path, ZERO, ZERO, ZERO)), sum(m.double() for m in MODELS) / 3)
    large = F.clone()
    large[3, 4] = 1e12
    made = merge("fisher", None, MODELS, statistics=fishers(tmp_path, F, large, F))
    assert float(made[3, 4]) == pytest.approx(float(MODELS[1][3, 4]), rel=1e-5)


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for method in ("fisher", "regmean"):
        with pytest.raises(EspalierError, match=r"statistics names no files; there are 3 models.*espalier calibrate"):
            merge(method, None, MODELS)
    with pytest.raises(EspalierError, match=r"is \[16, 24\]; the tensor is \[24, 16\]"):
        merge("fisher", None, MODELS, statistics=fishers(tmp_path, *[random(1, 16, 24)] * 3))
    other = [calibration(tmp_path / f"o{i}", {"x": ZERO}, {}) for i in range(3)]
    with pytest.raises(EspalierError, match="holds no fisher of 'w'"):
        merge("fisher", None, MODELS, statistics=other)
    with pytest.raises(EspalierError, match="no second moments of any matrix"):
        merge("regmean", None, MODELS, statistics=other)


def inputs(folder: Path, X: list[torch.Tensor], name: str = "w") -> list[str]:
    return [
        calibration(folder / f"{i}.calibration", {}, {name: x.double().mT @ x.double()}, tokens=len(x)) for i, x in enumerate(X)
    ]


def test_regmean_minimises_the_difference_of_outputs(tmp_path: Path) -> None:
    X = [random(i, 200, 16) * torch.linspace(0.1, 2, 16) for i in (4, 5, 6)]
    made = merge("regmean", None, MODELS, statistics=inputs(tmp_path, X), alpha=1.0, ridge=0.0).double()
    stacked = torch.cat([x.double() for x in X])
    wanted = torch.cat([x.double() @ m.double().mT for x, m in zip(X, MODELS, strict=True)])
    near(made, torch.linalg.lstsq(stacked, wanted).solution.mT)


def test_regmean_without_what_is_off_the_diagonal_is_a_weighted_mean_of_columns(tmp_path: Path) -> None:
    X = [random(i, 100 * i, 16) for i in (4, 5, 6)]
    weights = [0.5, 1.0, 2.0]
    made = merge("regmean", None, MODELS, weights=weights, statistics=inputs(tmp_path, X), alpha=0.0, ridge=0.0)
    shares = [w * x.double().square().mean(0) for w, x in zip(weights, X, strict=True)]
    near(made, sum(s * m.double() for s, m in zip(shares, MODELS, strict=True)) / sum(shares))


@pytest.mark.parametrize("size", [16, 24])
def test_regmean_of_conv1d_is_that_of_the_transposed_matrices(size: int, tmp_path: Path) -> None:
    """Square ones too: how a model's matrices lie is seen by those that are not square."""
    models = [{"w": m[:size] if size < 24 else m, "other": random(40 + i, 16, 40)} for i, m in enumerate(MODELS)]
    X = [random(i, 100, 16) for i in (4, 5, 6)]
    plain, turned = [], []
    for i, x in enumerate(X):
        gram = x.double().mT @ x.double()
        plain.append(calibration(tmp_path / f"p{i}", {}, {"w": gram}, 100))
        turned.append(calibration(tmp_path / f"t{i}", {}, {"w": gram, "other": gram}, 100))
    expected = merge_all("regmean", None, models, statistics=plain)["w"]
    made = merge_all("regmean", None, [{**m, "w": m["w"].mT.contiguous()} for m in models], statistics=turned)["w"]
    near(made.mT, expected)


def test_inputs_that_never_came_give_the_mean_and_other_parameters_are_averaged(tmp_path: Path) -> None:
    X = [random(i, 100, 16) * (torch.arange(16) < 10) for i in (4, 5, 6)]
    models = [{"w": m, "norm": m[0]} for m in MODELS]
    made = merge_all("regmean", None, models, statistics=inputs(tmp_path, X))
    mean = sum(m.double() for m in MODELS) / 3
    near(made["w"][:, 10:], mean[:, 10:])
    assert not torch.allclose(made["w"][:, :10].double(), mean[:, :10], atol=1e-3)
    near(made["norm"], mean[0])


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_calibrations_of_a_whole_model_are_taken(method: str, tmp_path: Path) -> None:
    """Every tensor of a real model finds its statistics by name; copies of it are it."""
    made = str(tmp_path / "seedling.calibration")
    calibrate("seedling", "stdlib:docstrings:heldout", made, "second_moment,fisher", tokens=64, sequence_length=32, quiet=True)
    merge_models(["seedling", "seedling"], str(tmp_path / "out"), method=method, statistics=[made, made], quiet=True)
    before, after = ModelDirectory(resolve_model("seedling")), ModelDirectory(tmp_path / "out")
    for name in before:
        torch.testing.assert_close(after.read(name).float(), before.read(name).float(), rtol=1e-2, atol=1e-6)


# OPCM


def opcm_of(base: dict[str, torch.Tensor], models: list[dict[str, torch.Tensor]], alpha: float, linear: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The official algorithm with full square U and V, rescaled after every model, in float64."""
    base = {n: t.double() for n, t in base.items()}
    models = [{n: t.double() for n, t in m.items()} for m in models]

    def norm(changes: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([c.flatten() for c in changes.values()]).norm()

    merged = {n: t.clone() for n, t in models[0].items()}
    norms, last = [norm({n: models[0][n] - base[n] for n in base})], torch.tensor(1.0).double()
    for model in models[1:]:
        norms.append(norm({n: model[n] - base[n] for n in base}))
        for name in base:
            P, D = merged[name] - base[name], model[name] - base[name]
            if name in linear:
                U, S, V = torch.linalg.svd(P, full_matrices=True)
                k = int((S.cumsum(0) / S.sum() > alpha).int().argmax())
                C = U.mT @ D @ V.mT
                C.diagonal().zero_()
                C[:k, :k] = 0
                D = U @ C @ V
            merged[name] = base[name] + last * P + D
        last = norm({n: merged[n] - base[n] for n in base}) / (sum(norms) / len(norms))
        merged = {n: base[n] + (merged[n] - base[n]) / last for n in base}
    return merged


SHAPES = {"wide.weight": (12, 30), "tall.weight": (40, 10), "norm": (12,), "embed_tokens.weight": (20, 12)}


def opcm_world(count: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    base = {n: random(i, *s) for i, (n, s) in enumerate(SHAPES.items())}
    return base, [{n: t + random(100 * m + i, *t.shape) / (m + 1) for i, (n, t) in enumerate(base.items())} for m in range(1, count + 1)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_opcm_is_the_official_sequence(alpha: float, count: int) -> None:
    base, models = opcm_world(count)
    made = merge_all("opcm", base, models, alpha=alpha)
    for name, expected in opcm_of(base, models, alpha, ("wide.weight", "tall.weight")).items():
        near(made[name], expected, 1e-5)


def test_what_opcm_adds_is_orthogonal_to_what_was_there() -> None:
    from espalier.merge.opcm import projected

    there, change = random(1, 12, 30), random(2, 12, 30)
    added = projected(change, there, 0.5).double()
    U, S, V = torch.linalg.svd(there.double(), full_matrices=False)
    assert float((added * there.double()).sum().abs()) < 1e-4
    assert float((U.mT @ added @ V.mT).diagonal().abs().max()) < 1e-5
    k = int((S.cumsum(0) / S.sum() > 0.5).int().argmax())
    assert k and float((U[:, :k].mT @ added @ V[:k].mT).abs().max()) < 1e-5


def test_the_norm_of_what_opcm_merged_is_the_mean_norm_of_the_changes() -> None:
    base, models = opcm_world(4)

    def norm(tensors: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(tensors[n] - base[n]).flatten().double() for n in base]).norm())

    made = merge_all("opcm", base, models)
    assert norm(made) == pytest.approx(sum(map(norm, models)) / 4, rel=1e-5)


