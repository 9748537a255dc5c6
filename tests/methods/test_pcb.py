"""PCB-Merging (#17): whole-model quantiles, the three balancings, the scores."""

from __future__ import annotations

import pytest
import torch
from mergers import merge_all, method_of, random

from espalier.delta import merging
from espalier.delta.merging import Piece, Whole
from espalier.kernels.merging import Between

SHAPES = {"a": (30, 20), "b": (50,), "c": (4, 6, 5), "d": ()}
BASE = {name: random(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
MODELS = [{n: t + 0.2 * random(10 * m + i, *t.shape) for i, (n, t) in enumerate(BASE.items())} for m in (1, 2, 3)]


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def reference(models: list[dict[str, torch.Tensor]], density: float, clamp: float, inter: str, weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(merged change, S) of flat vectors in float64, by sorting them whole."""
    T = torch.stack([(flat(m) - flat(BASE)).double() for m in models])
    N, d = T.shape
    order = T.abs().sort(-1).values
    low, high = order[:, int(d * clamp)][:, None], order[:, min(int(d * (1 - clamp)), d - 1)][:, None]
    A = T.abs().clip(low, high)
    a = (A - low) / (high - low)
    s = T.sign() * a
    if inter == "pairs":
        between = torch.stack([sum(torch.tanh(s[i] * s[j]) for j in range(N)) for i in range(N)])
    elif inter == "normalized":
        between = torch.tanh(T * s.sum(0))
    else:
        between = torch.tanh(T * T.sum(0))
    B = torch.exp(N * a**2) * between
    ranked = B.sort(-1).values
    cut, most = ranked[:, min(int(d * (1 - density)), d - 1)][:, None], ranked[:, -1:]
    S = (B.clamp_min(cut) - cut) / (most - cut)
    lam = torch.tensor(weights, dtype=torch.float64)[:, None]
    return (lam * S * T.sign() * A).sum(0) / S.sum(0).clamp_min(1e-12), S


@pytest.mark.parametrize("inter", ["pairs", "normalized", "raw"])
@pytest.mark.parametrize(("density", "clamp"), [(0.1, 0.0001), (0.3, 0.02), (1.0, 0.0)])
@pytest.mark.parametrize("sample", [1 << 15, 64])
def test_it_is_the_equation_over_the_whole_model(inter: str, density: float, clamp: float, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SAMPLE", sample)
    monkeypatch.setattr(merging, "PIECE", 100)
    weights = [1.0, 0.8, 1.2]
    made = merge_all("pcb", BASE, MODELS, weights=weights, scale=0.9, inter=inter, density=density, clamp=clamp)
    expected, S = reference(MODELS, density, clamp, inter, weights)
    assert float(S.min()) == 0 and torch.equal(S.amax(-1), torch.ones(3, dtype=torch.float64)), "the rows of S lie in [0, 1]"
    torch.testing.assert_close((flat(made) - flat(BASE)).double(), 0.9 * expected, rtol=2e-4, atol=2e-6)


def test_one_model_gives_the_clamped_change_where_it_is_kept_and_nothing_elsewhere() -> None:
    made = flat(merge_all("pcb", BASE, MODELS[:1], density=0.2, clamp=0.05)) - flat(BASE)
    change = flat(MODELS[0]) - flat(BASE)
    d = len(change)
    order = change.abs().sort().values
    clamped = change.sign() * change.abs().clip(order[int(d * 0.05)], order[int(d * 0.95)])
    kept = made.abs() > 1e-7
    torch.testing.assert_close(made[kept], clamped[kept], rtol=1e-4, atol=1e-6)
    # all of the largest have the score 1 where the clamp drew them to one value; the cut itself scores 0
    assert d - int(d * 0.8) - 1 == int(kept.sum())


def test_many_models_do_not_overflow() -> None:
    models = [{n: t + 0.2 * random(100 * m + i, *t.shape) for i, (n, t) in enumerate(BASE.items())} for m in range(120)]
    assert all(bool(t.isfinite().all()) for t in merge_all("pcb", BASE, models).values())


@pytest.mark.parametrize("shares", [[0.0, 0.5, 1.0], [0.0001, 0.9, 0.9999]])
@pytest.mark.parametrize("kind", ["normal", "many zeros", "few values", "negative"])
def test_quantiles_are_those_of_all_numbers_in_order(kind: str, shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force; also where most numbers are equal, and where the sample knows nothing of the rest."""
    monkeypatch.setattr(merging, "PIECE", 64)
    monkeypatch.setattr(merging, "SAMPLE", 32)

    def vary(tensor: torch.Tensor) -> torch.Tensor:
        if kind == "many zeros":
            return torch.where(tensor > 1.2, tensor, 0.0)
        if kind == "few values":
            return tensor.round()
        return -tensor.abs() if kind == "negative" else tensor

    from mergers import Held

    tensors = {name: [vary(random(7 * m + i, *shape)) for m in range(2)] for i, (name, shape) in enumerate(SHAPES.items())}
    parameters = [Held(None, models, [1.0, 1.0], 1.0, name, 0, None) for name, models in tensors.items()]
    whole = Whole(parameters, lambda do: map(do, parameters))

    def gather(piece: Piece, found: list[tuple[int, Between]]) -> None:
        for model, between in found:
            between.add(piece.models[model].flatten())

    found = whole.quantiles(gather, shares)
    for model in range(2):
        order = torch.cat([tensors[name][model].flatten() for name in SHAPES]).sort().values
        for share, quantile in zip(shares, found, strict=True):
            assert float(quantile[model]) == float(order[min(int(share * len(order)), len(order) - 1)])


def test_it_declares_a_first_pass() -> None:
    assert method_of("pcb").first_pass is not None
