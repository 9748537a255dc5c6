"""Intrinsic dimension (arXiv:1804.08838), DID and SAID (arXiv:2012.13255): one vector for all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.load import load
from espalier.delta import store
from espalier.delta.forms import Subspace
from espalier.delta.forms.subspace import PROJECTIONS
from espalier.errors import EspalierError
from espalier.exchange.save import save
from espalier.kernels.philox import Stream
from espalier.kernels.subspace import fastfood, padded

every_projection = pytest.mark.parametrize("projection", PROJECTIONS)


def intrinsic(family: str = "llama", **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(tiny(family), "intrinsic", name="d", **{"dimensions": 40, **options})
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def P(attachment: Attachment) -> torch.Tensor:
    """The whole projection, (D, d) float64, parameters below each other."""
    rows = []
    for slot in attachment.slots.values():
        update = slot.method.export(slot, attachment.pool)
        units = torch.eye(len(update.z)).double()
        weight = torch.zeros(update.shape).double()
        rows.append(torch.stack([update.with_tensors({"z": unit}).materialize(weight).flatten() for unit in units], 1))
    return torch.cat(rows)


def one(projection: str, entries: int, dimensions: int, seed: int = 0) -> Subspace:
    """An update of one parameter of so many entries, with the scale that the method gives it when it is alone."""
    scale = {"dense": entries**-0.5, "sparse": entries**-0.25, "fastfood": (padded(dimensions) / entries) ** 0.5}[projection]
    nonzeros = round(dimensions * entries**0.5) if projection == "sparse" else 0
    return Subspace(torch.zeros(dimensions).double(), Stream(seed, "w"), projection, (entries,), scale=scale, nonzeros=nonzeros)


def lifted(update: Subspace, z: torch.Tensor) -> torch.Tensor:
    return update.with_tensors({"z": z}).materialize(torch.zeros(update.shape).double())


@every_projection
@pytest.mark.parametrize("dimensions", [7, 9, 10, 12])
def test_the_loss_of_the_toy_problem_reaches_zero_if_and_only_if_d_is_at_least_10(projection: str, dimensions: int) -> None:
    """D = 1000 numbers in 10 groups of 100; the loss is the sum over groups k of (sum of the group - k)^2."""
    update = one(projection, 1000, dimensions)
    sums = torch.stack([lifted(update, unit).view(10, 100).sum(1) for unit in torch.eye(dimensions).double()], 1)  # (10, d)
    wanted = torch.arange(1, 11).double()
    z = torch.linalg.lstsq(sums, wanted[:, None], driver="gelsd").solution
    loss = (lifted(update, z[:, 0]).view(10, 100).sum(1) - wanted).square().sum()
    assert (loss < 1e-12) == (dimensions >= 10), float(loss)


@every_projection
@pytest.mark.parametrize(("entries", "dimensions"), [(1000, 10), (5000, 300), (3, 50)])
def test_the_gradient_is_the_adjoint(projection: str, entries: int, dimensions: int) -> None:
    """<P u, v> = <u, P^T v>: the copied Hadamard function of others has a backward that is off by a constant."""
    update = one(projection, entries, dimensions)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(dimensions, generator=generator).double().requires_grad_()
    v = torch.randn(entries, generator=generator).double()
    product = (lifted(update, u) * v).sum()
    (gradient,) = torch.autograd.grad(product, u)
    torch.testing.assert_close((u * gradient).sum(), product)
    other = torch.randn(dimensions, generator=generator).double()
    torch.testing.assert_close((other * gradient).sum(), (lifted(update, other) * v).sum())


@every_projection
def test_it_keeps_lengths_on_average_the_better_the_more_entries_there_are(projection: str) -> None:
    """E ||P u||^2 = ||u||^2; P is nearly isometric."""
    generator = torch.Generator().manual_seed(0)
    spreads = []
    for entries in (100, 10000):
        u = torch.randn(20, generator=generator).double()
        ratios = torch.stack([lifted(one(projection, entries, 20, seed), u).square().sum() / u.square().sum() for seed in range(60)])
        spreads.append(float(ratios.std()))
        assert float(ratios.mean()) == pytest.approx(1, abs=5 * spreads[-1] / 60**0.5)
    assert spreads[1] < spreads[0] / 3 and spreads[1] < 0.1


@every_projection
@pytest.mark.parametrize("targets", ["linear", "all"])
def test_columns_have_unit_length_over_all_parameters_together(projection: str, targets: str) -> None:
    """Not each parameter's by themselves: a larger parameter has the larger part."""
    _, attachment = intrinsic(projection=projection, targets=targets)
    lengths = P(attachment).square().sum(0)
    assert float(lengths.mean()) == pytest.approx(1, abs=0.03)
    assert float((lengths - 1).abs().max()) < 0.25


def test_blocks_of_fastfood_have_columns_of_exactly_unit_length() -> None:
    units = torch.eye(13).double()
    block = torch.stack([fastfood(unit, (1, 2), 0, 16) for unit in units], 1)
    torch.testing.assert_close(block.square().sum(0), torch.ones(13).double())


@every_projection
def test_rows_depend_on_the_seed_and_the_name_alone(projection: str) -> None:
    """Neither on the order of the parameters, nor on which others there are, but for the scale."""
    _, few = intrinsic(projection=projection, targets="attention.q", seed=3)
    _, more = intrinsic(projection=projection, targets="mlp,attention.q", seed=3)
    _, other = intrinsic(projection=projection, targets="attention.q", seed=4)
    z = torch.randn(40)
    for name, slot in few.slots.items():
        made = []
        for attachment in (few, more, other):
            update = attachment.slots[name].method.export(attachment.slots[name], attachment.pool)
            update.scale, update.nonzeros = 1.0, 50 if projection == "sparse" else 0
            made.append(update.with_tensors({"z": z}).materialize(torch.zeros(slot.target.shape)))
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@every_projection
@pytest.mark.parametrize(("structure", "targets"), [(False, "linear"), (True, "linear"), (True, "all")])
def test_d_numbers_train_in_all(structure: bool, targets: str, projection: str) -> None:
    """DID: z has d; SAID: d less the number of parameters, which have a scalar each."""
    model, attachment = intrinsic(structure=structure, targets=targets, projection=projection)
    assert torch.equal(model(tokens()).logits, tiny("llama")(tokens()).logits), "theta is theta_0 at the start"
    assert attachment.trainable() == 40
    z = trainable_parameters(model)["espalier_pools.d.z"]
    assert len(z) == 40 - len(attachment.slots) * structure
    model(tokens(), labels=tokens()).loss.backward()
    assert z.grad is not None and z.grad.abs().min() > 0


@every_projection
def test_the_gradient_of_the_vector_is_the_projected_gradient_of_all_weights(projection: str) -> None:
    model, attachment = intrinsic(projection=projection, targets="all", dimensions=20)
    dense = tiny("llama")
    for m in (model, dense):
        m(tokens(), labels=tokens()).loss.backward()
    gradients = torch.cat([dense.get_parameter(name).grad.flatten() for name in attachment.slots])
    torch.testing.assert_close(attachment.pool.z.grad.double(), P(attachment).T @ gradients.double(), rtol=1e-4, atol=1e-6)


@every_projection
def test_the_delta_is_a_seed_and_the_vector_once(projection: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model, attachment = intrinsic(projection=projection, targets="all", structure=True)
    shake(model)
    save(model, tmp_path / "delta", base=tmp_path / "base")
    assert store.load(tmp_path / "delta").nbytes == 4 * attachment.trainable() == 4 * 40
    torch.manual_seed(9)
    torch.testing.assert_close(load(tmp_path / "base", [tmp_path / "delta"])(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dimensions": 0}, "dimensions is 0; it must be at least 1"),
        ({"dimensions": 14, "structure": True}, "dimensions is 14, which leaves no number beside the scalars of 14 parameters"),
        ({"projection": "hashed"}, "projection is 'hashed'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint):
        intrinsic(**options)
