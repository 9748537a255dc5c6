"""AdamW (arXiv:1711.05101), as torch computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier import registry
from espalier.attach.attachment import attach, trainable_parameters
from espalier.data.batches import Cursor
from espalier.errors import EspalierError
from espalier.train import checkpoint

Parameters = dict[str, torch.nn.Parameter]


def some() -> Parameters:
    """A matrix, a stack of matrices, a vector and a number."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (6, 4), "stack": (2, 3, 4), "vector": (5,), "number": ()}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def gradients(parameters: Parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def adamw(parameters: Parameters, rate: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    return registry.make("adamw", "optimizer", **options).build(parameters, rate)


def test_several_steps_are_the_equation() -> None:
    """In float64, with the loop's way to set the rate: other rates each step, the same for decayed and undecayed tensors."""
    beta1, beta2, epsilon, decay = 0.8, 0.9, 1e-3, 0.3
    parameters = some()
    optimizer = adamw(parameters, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)
    expected = {name: p.detach().double() for name, p in parameters.items()}
    m, v = ({name: torch.zeros_like(w) for name, w in expected.items()} for _ in range(2))
    for step, rate in enumerate((0.1, 0.02, 0.3), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        gradients(parameters, step)
        for name, w in expected.items():
            g = parameters[name].grad.double()  # type: ignore[union-attr]
            m[name], v[name] = beta1 * m[name] + (1 - beta1) * g, beta2 * v[name] + (1 - beta2) * g * g
            direction = m[name] / (1 - beta1**step) / ((v[name] / (1 - beta2**step)).sqrt() + epsilon)
            expected[name] = w - rate * (direction + (decay * w if w.ndim >= 2 else 0))
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_decay_acts_on_matrices_alone() -> None:
    parameters = some()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = adamw(parameters, rate=0.5, weight_decay=0.1)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in parameters.items():
        kept = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_state_has_the_bytes_that_are_declared(method: str) -> None:
    """Two numbers per trained number; the count of steps, one number a tensor, is left out."""
    model = attach(tiny("llama"), method)
    parameters = trainable_parameters(model)
    optimizer = adamw(parameters)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    trained, shapes = sum(p.numel() for p in parameters.values()), {name: tuple(p.shape) for name, p in parameters.items()}
    assert sum(t.nbytes for t in held) == registry.make("adamw", "optimizer").state_bytes(shapes) == 8 * trained
    assert all(state["step"].numel() == 1 for state in optimizer.state.values())


def test_a_saved_optimizer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    results = []
    for interrupted in (False, True):
        parameters = some()
        optimizer = adamw(parameters, weight_decay=0.1)
        for step in range(6):
            if interrupted and step == 3:
                path = checkpoint.save(tmp_path, parameters, optimizer, checkpoint.State(step, Cursor(), 0, 0.0))
                parameters = {name: torch.nn.Parameter(torch.zeros_like(p)) for name, p in some().items()}
                optimizer = adamw(parameters, weight_decay=0.1)
                state, differences = checkpoint.load(path, parameters, optimizer)
                assert state.step == 3 and not differences
            gradients(parameters, step)
            optimizer.step()
        results.append(parameters)
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name]) and not torch.equal(parameter, some()[name])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"beta1": 1.0}, "beta1 is 1.0; it must be at least 0 and less than 1"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"beta2": float("nan")}, "beta2 is nan"),
        ({"epsilon": -1e-8}, "epsilon is -1e-08; it must be at least 0"),
        ({"weight_decay": -1}, r"weight_decay is -1\.0; it must be at least 0"),
        ({"weight_decay": "much"}, "weight_decay is 'much'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        registry.make("adamw", "optimizer", **options)


def test_numbers_of_their_own_age_keep_it_under_a_closure_and_when_loaded() -> None:
    places = torch.zeros(6, 4, dtype=torch.bool)
    places[0] = True

    def made(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.ones(6, 4, dtype=dtype))
        optimizer = adamw({"matrix": parameter})
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.renew(parameter, places, None, None, 0)  # type: ignore[attr-defined]
        return parameter, optimizer

    found = []
    for with_closure in (False, True):
        parameter, optimizer = made()
        parameter.grad = None

        def closure(parameter: torch.nn.Parameter = parameter) -> float:
            parameter.grad = torch.full_like(parameter, 2.0)
            return 1.0

        if not with_closure:
            closure()
        optimizer.step(closure if with_closure else None)
        assert optimizer.state[parameter]["age"][0].tolist() == [1.0] * 4
        found.append(parameter.detach())
    assert torch.equal(*found)
    parameter, optimizer = made(torch.bfloat16)
    optimizer.state[parameter]["age"] += 300
    _, again = made(torch.bfloat16)
    again.load_state_dict(optimizer.state_dict())
    (state,) = again.state.values()
    assert state["age"].dtype == torch.float32 and state["age"][0].tolist() == [300.0] * 4
