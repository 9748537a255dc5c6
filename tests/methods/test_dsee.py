"""DSEE (arXiv:2111.00160): low rank, and a few entries where the weight is not of low rank."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.adapt.dsee import decompose
from espalier.attach.attachment import Attachment, attach, attachments, stored, trainable_parameters
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream


def dsee(family: str = "llama", **options: Any) -> tuple[nn.Module, Attachment]:
    model = attach(tiny(family), "dsee", name="d", **options)
    return model, attachments(model)["d"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


every_support = pytest.mark.parametrize("support", ["decomposition", "magnitude", "random"])


@every_support
@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention"), ("qwen3_moe", "experts")])
def test_every_matrix_has_exactly_n_entries(family: str, targets: str, support: str) -> None:
    """|Omega| = n exactly."""
    _, attachment = dsee(family, targets=targets, entries=7, support=support)
    for slot in attachment.slots.values():
        size = slot.target.outputs * slot.target.inputs
        experts, counts = (slot.index // size).unique(return_counts=True)
        assert len(experts) == slot.target.size // size and set(counts.tolist()) == {7}
        assert bool((slot.index.diff() > 0).all()) and len(slot.s) == len(slot.index)


def test_there_are_no_more_entries_than_the_matrix_has() -> None:
    _, attachment = dsee(entries=5000, targets="attention.k", support="magnitude")
    assert all(len(slot.s) == slot.target.size for slot in attachment.slots.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_the_decomposition_does_not_rise_from_round_to_round(seed: int) -> None:
    weight = random(40, 30, seed=seed) * 0.03
    U, V, support, errors = decompose(weight, 12, 9, Stream(seed, "w"))
    assert len(errors) > 4 and all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert V.shape == (12, 30) and U.shape == (40, 12) and len(support.unique()) == 9
    left = (weight - U @ V).flatten()
    left[support] = 0
    torch.testing.assert_close(left.norm(), errors[-1])


@pytest.mark.parametrize("seed", range(3))
def test_the_support_is_where_the_weight_is_not_of_low_rank(seed: int) -> None:
    """Spikes on a low-rank matrix whose own entries are larger: they are found, where magnitude finds none."""
    places = set(torch.randperm(60 * 50, generator=torch.Generator().manual_seed(seed))[:12].tolist())
    weight = random(60, 3, seed=seed) @ random(3, 50, seed=seed + 9)
    weight.view(-1)[list(places)] += 1.0
    found = decompose(weight, 3, 12, Stream(0, "w"))[2].tolist()
    assert len(places & set(found)) >= 9
    assert len(places & set(weight.flatten().abs().topk(12).indices.tolist())) <= 3


def test_the_factor_multiplies_the_sparse_part_too() -> None:
    """dW = (alpha / r) (B A + P_Omega(s))."""
    model, attachment = dsee(rank=4, alpha=6.0, entries=5)
    with torch.no_grad():
        for seed, parameter in enumerate(trainable_parameters(model).values()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    for name, slot in attachment.slots.items():
        expected = (slot.B @ slot.A).detach()
        expected.view(-1)[slot.index.long()] += slot.s.detach()
        torch.testing.assert_close(slot.update().materialize(stored(model, name)).detach(), 6 / 4 * expected, rtol=1e-4, atol=1e-5)


def test_the_start_is_the_base_and_the_support_the_seeds() -> None:
    model, first = dsee(seed=1)
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits)
    for support, same in (("random", False), ("magnitude", True)):
        a, b, c = (dsee(seed=s, support=support)[1] for s in (1, 1, 2))
        for name in first.slots:
            assert torch.equal(a.slots[name].index, b.slots[name].index)
            assert torch.equal(a.slots[name].index, c.slots[name].index) == same


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add(tuple(result.shape))
        return result


def test_a_few_entries_cost_no_dense_gradient() -> None:
    _, attachment = dsee(targets="mlp.down")
    update = next(iter(attachment.slots.values())).update()
    x = random(7, 48).requires_grad_()
    with _Shapes() as shapes:
        update.matmul(x).sum().backward()
    assert not shapes.seen & {(32, 48), (48, 32)}


@pytest.mark.parametrize(("options", "complaint"), [({"entries": 0}, "entries is 0"), ({"rank": 0}, "rank is 0"), ({"support": "all"}, "support is 'all'")])
def test_options_out_of_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        dsee(**options)
