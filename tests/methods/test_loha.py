"""LoHa (FedPara, arXiv:2108.06098): two low-rank matrices, multiplied entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.delta.base import DenseBase
from espalier.delta.forms import Hadamard


def loha(**options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny("llama"), "loha", name="d", **options)
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_the_start_is_the_base_exactly() -> None:
    model, _ = loha()
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)


@pytest.mark.parametrize("rank", [2, 4])
def test_the_rank_reaches_r_squared_where_lora_of_as_many_numbers_has_2_r(rank: int) -> None:
    """Proposition 1 of FedPara: rank((B1 A1) * (B2 A2)) <= r1 r2, which random factors reach."""
    model, attachment = loha(rank=rank, targets="attention.q,mlp")
    shake(model)
    for slot in attachment.slots.values():
        with torch.no_grad():
            dense = slot.update().materialize(torch.zeros(slot.target.shape, dtype=torch.float64))
            torch.testing.assert_close(dense.float(), 8.0 / rank * (slot.B1 @ slot.A1) * (slot.B2 @ slot.A2))
        assert int(torch.linalg.matrix_rank(dense)) == rank**2
        assert sum(p.numel() for p in slot.parameters()) == 2 * rank * sum(slot.target.shape)


class Sizes(TorchDispatchMode):
    """Records the number of entries of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor) and "view" not in str(func) and ".t." not in str(func)]
        return out


@pytest.mark.parametrize(("rank", "has_dense"), [(3, False), (8, True)])
def test_a_step_makes_no_matrix_of_the_weights_size_where_r_squared_is_less_than_full(rank: int, has_dense: bool) -> None:
    factors = [torch.randn(shape, requires_grad=True) for shape in ((60, rank), (rank, 50), (60, rank), (rank, 50))]
    update, x = Hadamard(*factors), torch.randn(4, 50, requires_grad=True)
    base = DenseBase(torch.randn(60, 50))
    expected = torch.autograd.grad((x @ update.apply(base.dense()).T).square().sum(), [x, *factors])
    with Sizes() as sizes:
        found = torch.autograd.grad(update.linear(x, base).square().sum(), [x, *factors])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-2)
    assert (max(sizes.made) >= 60 * 50) is has_dense
