"""What every compression method must do, whatever the form of the update: no line here knows a method.

The methods come from the registry, with their default options; those that compare with another delta (the option
``against``) get one. What is special to a method is tested in ``tests/methods``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens

from espalier import registry
from espalier.anatomy.parameters import parameters
from espalier.attach.attachment import attach_updates, detach
from espalier.delta import store
from espalier.delta.compression import Compressor, Outcome, Whole, compress
from espalier.delta.fit import relative_error
from espalier.delta.forms import Columns, Dense, LowRank, Magnitude, Replace, Rows, Sparse, Update
from espalier.errors import EspalierError

METHODS = [info.name for info in registry.methods() if info.role == "compressor"]
every_method = pytest.mark.parametrize("method", METHODS)
pytestmark = [pytest.mark.room("compress")]
SHAPES = {"matrix": (48, 40), "tall": (96, 16), "experts": (3, 24, 20), "convolution": (12, 6, 3, 3), "vector": (64,), "number": ()}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(shape: tuple[int, ...], seed: int, rank: int = 4) -> LowRank:
    *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    return LowRank(random(seed, *lead, outputs, rank), random(seed + 1, *lead, rank, inputs) / 4, 0.5, shape)


def additive(shape: tuple[int, ...], seed: int = 0) -> dict[str, Update]:
    """An update of each form that fits the shape and does not depend on the base."""
    entries = math.prod(shape)
    index = torch.randperm(max(entries, 1), generator=torch.Generator().manual_seed(seed))[: max(entries // 3, 1)].sort().values
    made: dict[str, Update] = {"dense": Dense(random(seed, *shape), 0.5), "sparse": Sparse(random(seed, len(index)), index, shape, 0.5)}
    if len(shape) > 1:
        *lead, outputs, inputs = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
        places = torch.tensor([1, 4, 6]).expand(*lead, 3)
        made["low rank"] = low_rank(shape, seed)
        made["columns"] = Columns(random(seed, *lead, outputs, 3), places, inputs, 0.5, shape)
        made["rows"] = Rows(random(seed, *lead, 3, inputs), places, outputs, 0.5, shape)
    return made


def everything() -> dict[str, Update]:
    return {f"layers.0.{form} {kind}": update for kind, shape in SHAPES.items() for form, update in additive(shape).items()}


def whole(updates: dict[str, Update], **manifest: Any) -> Whole:
    facts = {"base": {"name": "x", "fingerprint": "sha256:0"}, "settings": {"seed": 0}, **manifest}
    return Whole(store.Delta(updates, {name: store.Layout() for name in updates}, facts))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of the same parameters, for methods that compare with one."""
    folder = tmp_path_factory.mktemp("other") / "delta"
    shapes = {name: update.shape for name, update in everything().items()}
    updates = {name: additive(shape, 7)[name.split(".")[2].rpartition(" ")[0]] for name, shape in shapes.items()}
    store.save(folder, whole(updates).delta, "")
    return folder


def make(method: str, other: Path) -> Compressor:
    names = [h.name for h in registry.find(method, "compressor").hyperparameters]
    return registry.make(method, "compressor", **({"against": str(other)} if "against" in names else {}))


def dense(update: Update) -> torch.Tensor:
    return update.materialize(torch.zeros(update.shape))


@every_method
def test_every_form_and_shape_comes_out_in_its_shape_and_finite(method: str, other: Path) -> None:
    updates = everything()
    made, outcomes = compress(make(method, other), whole(updates))
    assert set(made) <= set(updates) and [o.name for o in outcomes] == list(updates)
    for name, update in made.items():
        assert update.shape == updates[name].shape and bool(dense(update).isfinite().all())
        assert torch.equal(dense(update.scaled(0.0)), torch.zeros(update.shape)), "a gain of 0 is the base"
        torch.testing.assert_close(dense(update.scaled(2.0)), 2 * dense(update))
        outcome = next(o for o in outcomes if o.name == name)
        assert outcome.bytes == update.nbytes and outcome.form == update.form
        assert outcome.error == pytest.approx(float((dense(update) - dense(updates[name])).norm() / dense(updates[name]).norm()), abs=1e-6)


@every_method
def test_what_is_stored_is_read_back_bit_for_bit(method: str, other: Path, tmp_path: Path) -> None:
    made, _ = compress(make(method, other), whole(everything()))
    store.save(tmp_path / "d", whole(made).delta, "")
    read = store.load(tmp_path / "d").updates
    assert set(read) == set(made)
    for name, update in made.items():
        assert update.constants() == read[name].constants() and float(update.gain) == float(read[name].gain)
        for key, tensor in update.tensors().items():
            assert torch.equal(read[name].tensors()[key], tensor) and read[name].tensors()[key].dtype == tensor.dtype
        assert torch.equal(dense(read[name]), dense(update))


@every_method
def test_the_same_delta_and_seed_give_the_same_bits(method: str, other: Path) -> None:
    first, second = (compress(make(method, other), whole(everything()))[0] for _ in range(2))
    for name, update in first.items():
        assert all(torch.equal(tensor, second[name].tensors()[key]) for key, tensor in update.tensors().items())


@every_method
def test_a_delta_that_is_compressed_already_can_be_compressed(method: str, other: Path) -> None:
    """And is no larger then; of methods that take in another delta, no larger than the dense update."""
    made, _ = compress(make(method, other), whole(everything()))
    again, _ = compress(make(method, other), whole(made))
    takes_another = hasattr(make(method, other), "against")
    for name, update in again.items():
        assert bool(dense(update).isfinite().all())
        most = 4 * math.prod(update.shape) if takes_another else made[name].nbytes
        assert update.nbytes <= most, f"{name} became larger: {made[name].form} to {update.form}"


@every_method
def test_integers_and_new_tensors_stay_as_they_are(method: str, other: Path) -> None:
    updates: dict[str, Update] = {"layers.0.positions": Replace(torch.arange(5)), "layers.0.flags": Replace(torch.tensor([True, False]))}
    made, outcomes = compress(make(method, other), whole(updates))
    assert all(made[name] is update for name, update in updates.items()) and all(o.error == 0.0 for o in outcomes)


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(method: str, bad: float, other: Path) -> None:
    values = random(0, 48, 40)
    values[3, 5] = bad
    for update in (Dense(values), LowRank(values, random(1, 40, 50)), Columns(values, torch.arange(40), 50)):
        with pytest.raises(EspalierError, match=rf"{method} of layers\.0\.x: (values|B) of the update holds (nan|inf); every number of it must be finite"):
            compress(make(method, other), whole({"layers.0.x": update}))


@every_method
def test_an_update_of_zeros_stays_zero(method: str, other: Path) -> None:
    updates: dict[str, Update] = {"layers.0.a": Dense(torch.zeros(8, 8)), "layers.0.b": LowRank(torch.zeros(8, 2), random(0, 2, 8))}
    made, _ = compress(make(method, other), whole(updates))
    for update in made.values():
        assert not dense(update).any()


@every_method
def test_an_update_that_depends_on_the_base_is_refused_by_name_or_the_base_is_asked(method: str, other: Path) -> None:
    weight = random(5, 48, 40)
    updates: dict[str, Update] = {"layers.0.w": Replace(weight + random(0, 48, 40) / 10)}
    with pytest.raises(EspalierError, match=rf"{method} of layers\.0\.w: the form 'replace' depends on the base.*--model BASE"):
        compress(make(method, other), whole(updates))
    given = Whole(whole(updates).delta, 0, lambda name, layout, shape: weight)
    made, (outcome,) = compress(make(method, other), given)
    assert not made["layers.0.w"].depends_on_base and outcome.error == pytest.approx(relative_error(made["layers.0.w"], updates["layers.0.w"], weight))


@pytest.mark.parametrize("method", ["compeft", "magnitude"])
def test_what_is_found_out_over_the_whole_delta_is_refused_by_name_too(method: str) -> None:
    updates: dict[str, Update] = {"layers.0.a": Dense(random(0, 8, 8)), "layers.0.w": Replace(random(0, 48, 40))}
    with pytest.raises(EspalierError, match=rf"^{method} of layers\.0\.w: the form 'replace' depends on the base.*--model BASE"):
        compress(registry.make(method, "compressor", scope="global"), whole(updates))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_entries_of_zeros_make_up_for_nothing(scope: str) -> None:
    updates: dict[str, Update] = {"layers.0.zero": Dense(torch.zeros(8, 8)), "layers.0.w": Dense(torch.ones(2, 2))}
    for given in (updates, {"layers.0.zero": updates["layers.0.zero"]}):
        made, _ = compress(registry.make("magnitude", "compressor", scope=scope, rescale=True, density=0.9), whole(given))
        assert all(bool(dense(update).isfinite().all()) for update in made.values())
    assert "layers.0.zero" not in made or not dense(made["layers.0.zero"]).any()


@every_method
def test_magnitude_and_direction_are_compressed_or_refused_by_name(method: str, other: Path) -> None:
    weight = random(5, 48, 40)
    updates: dict[str, Update] = {"layers.0.w": Magnitude(weight.norm(dim=1), low_rank((48, 40), 0))}
    given = Whole(whole(updates).delta, 0, lambda name, layout, shape: weight)
    made, _ = compress(make(method, other), given)
    assert made["layers.0.w"].materialize(weight).shape == (48, 40)
    if method in ("compeft", "bit1", "quantize"):  # they work on what the direction is made of
        kept = compress(make(method, other), whole(updates))[0]["layers.0.w"]
        assert isinstance(kept, Magnitude) and torch.equal(kept.materialize(weight), made["layers.0.w"].materialize(weight))
    else:
        with pytest.raises(EspalierError, match=rf"{method} of layers\.0\.w: .*--model BASE"):
            compress(make(method, other), whole(updates))


@every_method
@pytest.mark.parametrize(("family", "targets"), [("llama", "linear"), ("gpt2", "attention,mlp"), ("qwen3_moe", "experts"), ("qwen2", "embedding")])
@torch.no_grad()
def test_the_compressed_delta_on_a_model_is_the_model_with_it_merged(method: str, family: str, targets: str, other: Path) -> None:
    from espalier.anatomy.parameters import select

    model = tiny(family)
    chosen = select(parameters(model), targets.split(","))
    updates: dict[str, Update] = {t.name: low_rank(t.shape, i).scaled(0.1) for i, t in enumerate(chosen)}
    made, _ = compress(make(method, other), whole(updates))
    attach_updates(model, made, "small")
    unmerged = model(tokens()).logits
    detach(model)
    plain = model(tokens()).logits
    for target in chosen:
        if target.name in made:
            weight = model.get_parameter(target.name)
            logical = weight.transpose(-1, -2) if target.transposed else weight
            logical.copy_(made[target.name].apply(logical))
    merged = model(tokens()).logits
    torch.testing.assert_close(unmerged, merged, rtol=2e-3, atol=2e-4 * float(merged.abs().max()))
    assert not torch.equal(merged, plain)


def test_there_are_methods_and_each_is_a_short_file() -> None:
    infos = [info for info in registry.methods() if info.role == "compressor"]
    assert len(infos) >= 7 and all(info.lines <= 90 for info in infos)


def test_an_outcome_is_plain_json() -> None:
    assert Outcome("a", "dense", "sparse", 8, 4, 0.5).as_json() == {
        "name": "a", "was": "dense", "form": "sparse", "bytes_before": 8, "bytes": 4, "error": 0.5,
    }  # fmt: skip
