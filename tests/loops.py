"""Short runs of training by hand that the conformance suites of updates and of branches share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch

from espalier.attach.attachment import trainable_parameters

Loss = Callable[[torch.nn.Module], torch.Tensor]


def randomize(model: torch.nn.Module, size: float) -> None:
    """Move every trained number away from its start, so that nothing is zero by luck."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def assert_all_move_in_two_steps(model: torch.nn.Module, loss_of: Loss, may_be_slight: bool = False) -> None:
    """Something that trains moves in the first step, and everything in the second.

    Where it ``may_be_slight``, a gradient that is not zero is enough: it may be small beside the numbers that it is of.
    """
    parameters = trainable_parameters(model)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    moved: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        slight = {name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())} if may_be_slight else set()
        moved.append({name for name, p in parameters.items() if not torch.equal(p, start[name])} | slight)
    assert moved[0]
    assert moved[1] == set(parameters)


def train(model: torch.nn.Module, loss_of: Loss, steps: int) -> None:
    """Steps of AdamW with decay, in which nothing but what trains gets a gradient."""
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} <= set(parameters)
        optimizer.step()


def train_on(model: torch.nn.Module, batches: Iterable[torch.Tensor], weight_decay: float) -> None:
    """A step of AdamW on each batch of token ids (rows, length)."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=weight_decay)
    for x in batches:
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        optimizer.step()


def assert_live_tensors_stay_flat(model: torch.nn.Module, loss_of: Loss) -> None:
    """Further steps leave no more tensors behind than the first do."""
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))

    gc.freeze()  # what the tests before have left is many times more, and goes bit by bit
    try:
        steps(2)
        first = steps(2)
        assert steps(8) <= first
    finally:
        gc.unfreeze()
