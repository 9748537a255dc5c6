"""linear, slerp, multislerp, karcher, model_stock and passthrough against their equations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from mergers import merge, random

from espalier.errors import EspalierError

BASE = random(0, 30, 20)
MODELS = [BASE + 0.2 * random(i, 30, 20) for i in (1, 2, 3)]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def near(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made.double(), expected.double(), **CLOSE)


# linear


def test_linear_is_the_weighted_mean() -> None:
    weights = [0.5, 1.0, 2.0]
    expected = sum(w * m.double() for w, m in zip(weights, MODELS, strict=True))
    near(merge("linear", None, MODELS, weights=weights), expected / 3.5)
    near(merge("linear", None, MODELS, weights=weights, normalize=False), expected)


def test_linear_is_the_base_and_the_linear_delta() -> None:
    expected = BASE.double() + sum(m.double() - BASE.double() for m in MODELS) / 3
    near(merge("linear", BASE, MODELS), expected)
    near(merge("linear", BASE, MODELS, scale=0.5), BASE.double() + (expected - BASE.double()) / 2)


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(EspalierError, match=r"the weights \[1.0, -1.0\] sum to 0"):
        merge("linear", None, MODELS[:2], weights=[1.0, -1.0])


def test_a_scale_of_models_needs_a_base() -> None:
    with pytest.raises(EspalierError, match=r"scale is 0.5; .*give one: --model BASE"):
        merge("linear", None, MODELS, scale=0.5)


def test_changes_need_a_base() -> None:
    with pytest.raises(EspalierError, match="--model BASE"):
        merge("task_arithmetic", None, MODELS)


# slerp


def slerp_of(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    a, b = a.double(), b.double()
    angle = torch.acos((a.flatten() @ b.flatten()) / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_the_arc(t: float) -> None:
    first, second = random(5, 30, 20), random(6, 30, 20)
    near(merge("slerp", None, [first, second], t=t), slerp_of(first, second, t))
    near(merge("slerp", None, [second, first], t=1 - t), merge("slerp", None, [first, second], t=t))
    if t in (0.0, 1.0):
        near(merge("slerp", None, [first, second], t=t), second if t else first)


def test_slerp_keeps_a_common_norm() -> None:
    first, second = random(5, 30, 20), random(6, 30, 20)
    second *= first.norm() / second.norm()
    made = merge("slerp", None, [first, second], t=0.37)
    assert float(made.norm()) == pytest.approx(float(first.norm()), rel=1e-5)


def test_slerp_of_changes_adds_the_base() -> None:
    expected = BASE.double() + slerp_of(MODELS[0] - BASE, MODELS[1] - BASE, 0.3)
    near(merge("slerp", BASE, MODELS[:2], t=0.3, of="updates"), expected)


def test_slerp_of_rows_is_an_arc_for_each() -> None:
    first, second = random(5, 30, 20), random(6, 30, 20)
    second[3] = 2 * first[3]
    made = merge("slerp", None, [first, second], t=0.3, per="row")
    for row in range(30):
        if row != 3:
            near(made[row], slerp_of(first[row], second[row], 0.3))
    near(made[3], 0.7 * first[3] + 0.3 * second[3])


@pytest.mark.parametrize("sign", [1, -1])
def test_slerp_between_parallel_models_is_straight(sign: int) -> None:
    other = sign * 3 * MODELS[0]
    near(merge("slerp", None, [MODELS[0], other], t=0.25), 0.75 * MODELS[0].double() + 0.25 * other.double())


def test_slerp_refuses_another_number_of_models() -> None:
    with pytest.raises(EspalierError, match="between two models, there are 3"):
        merge("slerp", None, MODELS)


# karcher and multislerp


def karcher_of(models: list[torch.Tensor], weights: list[float], steps: int = 200) -> torch.Tensor:
    vectors = [m.double().flatten() for m in models]
    shares = [w / sum(weights) for w in weights]
    units = [v / v.norm() for v in vectors]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            angle = torch.acos((unit @ mean).clamp(-1, 1))
            if angle > 1e-12:
                tangent += share * angle / torch.sin(angle) * (unit - torch.cos(angle) * mean)
        if tangent.norm() < 1e-14:
            break
        mean = torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / tangent.norm()
    return (mean * sum(s * v.norm() for s, v in zip(shares, vectors, strict=True))).reshape(models[0].shape)


def test_karcher_is_the_point_of_least_squared_angles() -> None:
    models = [random(i, 30, 20) for i in (5, 6, 7)]
    weights = [0.5, 1.0, 2.0]
    made = merge("karcher", None, models, weights=weights, iterations=100, tolerance=1e-9)
    near(made, karcher_of(models, weights))


def test_karcher_of_two_is_slerp_at_one_half_up_to_the_norm() -> None:
    first, second = random(5, 30, 20), 3 * random(6, 30, 20)
    made = merge("karcher", None, [first, second], iterations=100, tolerance=1e-9)
    straight = slerp_of(first / first.norm(), second / second.norm(), 0.5)
    near(made / made.norm(), straight / straight.norm())
    assert float(made.norm()) == pytest.approx(float(first.norm() + second.norm()) / 2, rel=1e-5)


def test_karcher_passes_over_a_model_that_is_zero() -> None:
    made = merge("karcher", None, [MODELS[0], torch.zeros(30, 20)])
    near(made / made.norm(), MODELS[0] / MODELS[0].norm())


def test_multislerp_is_one_step_from_the_mean_direction() -> None:
    models, weights = [random(i, 30, 20) for i in (5, 6, 7)], [0.5, 1.0, 2.0]
    vectors = [m.double().flatten() for m in models]
    shares = [w / 3.5 for w in weights]
    units = [v / v.norm() for v in vectors]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(s * (u - (u @ mean) * mean) for s, u in zip(shares, units, strict=True))
    point = torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / tangent.norm()
    expected = point * sum(s * v.norm() for s, v in zip(shares, vectors, strict=True))
    near(merge("multislerp", None, models, weights=weights), expected.view(30, 20))
    changed = merge("multislerp", BASE, [BASE + m for m in models], weights=weights, of="updates")
    near(changed, BASE.double() + expected.view(30, 20))


def test_multislerp_refuses_directions_that_cancel() -> None:
    vectors = [torch.tensor([[math.cos(a), math.sin(a)]]) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(EspalierError, match="no mean on the sphere"):
        merge("multislerp", None, vectors)


# model stock


def stock_of(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    changes = [m.double().flatten() - base.double().flatten() for m in models]
    count = len(models)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosine = sum(float(changes[i] @ changes[j] / (changes[i].norm() * changes[j].norm())) for i, j in pairs) / len(pairs)
    t = min(max(count * cosine / (1 + (count - 1) * cosine), 0.0), 1.0)
    return (t * sum(m.double() for m in models) / count + (1 - t) * base.double()).view(base.shape)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_the_mean_drawn_to_the_base(count: int) -> None:
    common = random(9, 30, 20)
    models = [BASE + common + random(i, 30, 20) for i in range(10, 10 + count)]
    near(merge("model_stock", BASE, models), stock_of(BASE, models))
    rows = torch.stack([stock_of(BASE[r : r + 1], [m[r : r + 1] for m in models])[0] for r in range(30)])
    near(merge("model_stock", BASE, models, per="row"), rows)


def test_model_stock_of_orthogonal_or_opposite_changes_is_the_base() -> None:
    change = torch.zeros(30, 20)
    change[0, 0], other = 1.0, torch.zeros(30, 20)
    other[1, 1] = 1.0
    assert torch.equal(merge("model_stock", BASE, [BASE + change, BASE + other]), BASE)
    near(merge("model_stock", BASE, [BASE + 0.1 * MODELS[0], BASE - 0.2 * MODELS[0]]), BASE)


# passthrough


def test_passthrough_gives_one_model_scaled_and_refuses_two() -> None:
    assert torch.equal(merge("passthrough", None, MODELS[:1]), MODELS[0])
    assert torch.equal(merge("passthrough", None, MODELS[:1], scale=0.5), MODELS[0] * 0.5)
    with pytest.raises(EspalierError, match="takes one model for a tensor, there are 2"):
        merge("passthrough", None, MODELS[:2])
