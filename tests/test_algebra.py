"""Whole deltas as vectors: the laws against dense arithmetic in float64, sizes, laziness, and what is refused."""

from __future__ import annotations

import math
import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.test_forms import ENTRIES, deep_shapes, gains, make, matrix_shapes, random, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import espalier
from espalier.attach.attachment import trainable_parameters
from espalier.delta import store
from espalier.delta.algebra import add, chain, combine, negate, restrict, scale
from espalier.delta.forms import (
    FORMS,
    Chain,
    Dense,
    Diagonal,
    LowRank,
    Magnitude,
    Pooled,
    Quantized,
    Replace,
    Sparse,
    Sum,
    Update,
)
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError

BASE = {"base": {"name": "x", "fingerprint": "sha256:0"}, "method": "made", "settings": {"seed": 3}}
ADDITIVE = [name for name in ENTRIES if not FORMS[name.split()[0]].depends_on_base and name != "quantized magnitude"]
SCALED = [name for name in ENTRIES if "replace" not in name]
properties = settings(deadline=None, max_examples=150)
additive, coefficients = st.sampled_from(ADDITIVE), st.floats(-3, 3, width=16)


def delta(updates: dict[str, Update], **manifest: Any) -> Delta:
    return Delta(updates, {name: Layout((name,)) for name in updates}, {**BASE, **manifest})


def low_rank(seed: int, outputs: int, inputs: int, rank: int = 2, gain: float = 1.0) -> LowRank:
    return LowRank(random(seed, outputs, rank), random(seed + 1, rank, inputs), gain)


def change(of: Delta, weight: torch.Tensor, name: str = "w") -> torch.Tensor:
    """The effective update, float64."""
    return of.updates[name].materialize(weight.double())


def assert_close(found: torch.Tensor, exact: torch.Tensor, *parts: torch.Tensor) -> None:
    largest = max([1.0, *(float(p.abs().max()) for p in parts)])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * largest)


# laws


@properties
@given(names=st.lists(additive, min_size=1, max_size=4), shape=deep_shapes, seed=seeds, gain=gains, data=st.data())
def test_a_linear_combination_of_any_additive_forms_is_that_of_their_dense_updates(
    names: list[str], shape: tuple[int, ...], seed: int, gain: float, data: st.DataObject
) -> None:
    weight = random(seed, *shape).double()
    made = [make(name, shape, seed + i, gain) for i, name in enumerate(names)]
    cs = data.draw(st.lists(coefficients, min_size=len(names), max_size=len(names)))
    terms = [c * (equation(weight) - weight) for c, (_, equation) in zip(cs, made, strict=True)]
    deltas = [delta({"w": update}) for update, _ in made]
    combined = combine(deltas, cs)
    assert_close(change(combined, weight), sum(terms), *terms)
    assert_close(change(add(*[scale(d, c) for d, c in zip(deltas, cs, strict=True)]), weight), sum(terms), *terms)


@properties
@given(names=st.tuples(additive, additive, additive), shape=deep_shapes, seed=seeds)
def test_sums_are_associative_and_commutative_to_rounding_and_a_chain_of_additive_updates_is_their_sum(
    names: tuple[str, ...], shape: tuple[int, ...], seed: int
) -> None:
    weight = random(seed, *shape).double()
    a, b, c = (delta({"w": make(name, shape, seed + i)[0]}) for i, name in enumerate(names))
    terms = [change(d, weight) for d in (a, b, c)]
    for one in (add(a, b, c), add(add(a, b), c), add(a, add(b, c)), add(c, b, a), chain([a, b, c])):
        assert not one.updates["w"].depends_on_base
        assert_close(change(one, weight), sum(terms), *terms)


@pytest.mark.parametrize("name", SCALED)
@settings(deadline=None, max_examples=15)
@given(shape=deep_shapes, seed=seeds, gain=gains, factor=coefficients)
def test_scaling_scales_the_effective_update_and_by_zero_restores_the_base(
    name: str, shape: tuple[int, ...], seed: int, gain: float, factor: float
) -> None:
    update, equation = make(name, shape, seed, gain)
    weight = random(seed + 5, *shape)
    exact = factor * (equation(weight.double()) - weight.double())
    scaled = scale(delta({"w": update}), factor)
    assert_close(change(scaled, weight), exact, exact, weight, exact / (factor or 1))
    assert scaled.updates["w"].form == update.form and float(update.gain) == gain
    assert torch.equal(scale(scaled, 0.0).updates["w"].apply(weight), weight)


@properties
@given(name=additive, shape=deep_shapes, seed=seeds, gain=gains)
def test_a_delta_and_its_negative_cancel(name: str, shape: tuple[int, ...], seed: int, gain: float) -> None:
    one, weight = delta({"w": make(name, shape, seed, gain)[0]}), torch.zeros(shape)
    assert_close(change(add(one, negate(one)), weight), torch.zeros(shape).double(), change(one, weight))
    assert torch.equal(change(negate(negate(one)), weight), change(one, weight))


@properties
@given(names=st.lists(st.sampled_from(list(ENTRIES)), min_size=1, max_size=3), shape=matrix_shapes, seed=seeds)
def test_a_chain_of_any_forms_applies_them_in_order(names: list[str], shape: tuple[int, int], seed: int) -> None:
    made = [make(name, shape, seed + i, 0.75) for i, name in enumerate(names)]
    weight = new = random(seed + 9, *shape).double()
    steps = [weight]
    for _, equation in made:
        steps.append(new := equation(new))
    chained = chain([delta({"w": update}) for update, _ in made])
    assert_close(chained.updates["w"].apply(weight), new, *steps)
    nested = chain([chain([delta({"w": update}) for update, _ in made[:-1]]), delta({"w": made[-1][0]})]) if len(made) > 1 else chained
    assert_close(nested.updates["w"].apply(weight), new, *steps)


@pytest.mark.parametrize("last", [Replace(torch.ones(5, 4)), Diagonal(torch.arange(5.0), None, (5, 4))])
def test_the_order_of_a_chain_matters_where_an_update_depends_on_the_base(last: Update) -> None:
    weight = random(0, 5, 4)
    first, second = delta({"w": low_rank(1, 5, 4)}), delta({"w": last})
    moved = first.updates["w"].apply(weight)
    torch.testing.assert_close(chain([first, second]).updates["w"].apply(weight), last.apply(moved))
    torch.testing.assert_close(chain([second, first]).updates["w"].apply(weight), first.updates["w"].apply(last.apply(weight)))
    assert not torch.allclose(chain([first, second]).updates["w"].apply(weight), chain([second, first]).updates["w"].apply(weight))


NAMES = ["embed.weight", *(f"model.layers.{i}.{part}.weight" for i in (0, 1, 10) for part in ("up", "down"))]


@properties
@given(chosen=st.sets(st.sampled_from(NAMES), min_size=1, max_size=len(NAMES) - 1), seed=seeds)
def test_what_is_restricted_and_its_complement_are_the_whole(chosen: set[str], seed: int) -> None:
    whole = delta({name: low_rank(seed + i, 6, 5) for i, name in enumerate(NAMES)})
    parts = [restrict(whole, names=chosen), restrict(whole, names=set(NAMES) - chosen)]
    assert set(parts[0].updates) == set(parts[0].layouts) == chosen
    joined = add(*parts)
    assert set(joined.updates) == set(NAMES) and joined.layouts == whole.layouts
    assert all(joined.updates[name] is whole.updates[name] for name in NAMES), "each is of one part, as it is"


def test_a_delta_is_restricted_by_globs_other_names_and_layers() -> None:
    whole = delta({name: low_rank(0, 6, 5) for name in NAMES})
    whole.layouts["embed.weight"] = Layout(("embed.weight", "lm_head.weight"))
    assert list(restrict(whole, names="*.up.*").updates) == [n for n in NAMES if ".up." in n]
    assert list(restrict(whole, names="lm_head*").updates) == ["embed.weight"]
    assert list(restrict(whole, layers=range(1, 2)).updates) == [n for n in NAMES if ".1." in n]
    assert list(restrict(whole, names=["*.up.*"], layers=[10]).updates) == ["model.layers.10.up.weight"]


# forms and sizes


def test_a_sum_of_low_rank_is_of_low_rank_with_the_ranks_added_and_narrow_numbers_stay_narrow() -> None:
    a, b = (delta({"w": low_rank(s, 64, 48, 2, gain=0.5)}) for s in (0, 2))
    same, other = add(a, b).updates["w"], combine([a, b], [1.0, -2.0]).updates["w"]
    assert isinstance(same, LowRank) and same.rank == 4 and same.nbytes == 2 * a.updates["w"].nbytes < 64 * 48 * 4 / 2
    assert float(same.gain) == 0.5, "a gain in common is not multiplied in"
    assert isinstance(other, LowRank) and other.rank == 4
    narrow = [delta({"w": d.updates["w"].with_tensors({k: t.bfloat16() for k, t in d.updates["w"].tensors().items()})}) for d in (a, b)]
    assert add(*narrow).updates["w"].dtype == torch.bfloat16


def test_factors_that_would_be_larger_than_the_dense_update_are_not_concatenated() -> None:
    deltas = [delta({"w": low_rank(s, 6, 5, 2)}) for s in range(3)]
    assert isinstance(add(*deltas).updates["w"], Sum)


def test_a_sum_of_sums_is_flat_and_dense_updates_are_one() -> None:
    sparse = Sparse(random(0, 3), torch.tensor([1, 4, 9]), (6, 5), 2.0)
    parts = [delta({"w": update}) for update in (sparse, Dense(random(1, 6, 5)), sparse, Dense(random(2, 6, 5).bfloat16(), 3.0))]
    whole = add(add(*parts[:2]), scale(add(*parts[2:]), 0.5)).updates["w"]
    assert isinstance(whole, Sum) and [p.form for p in whole.parts.values()] == ["dense", "sparse", "sparse"]
    assert_close(whole.materialize(torch.zeros(6, 5).double()), sum(c * change(p, torch.zeros(6, 5)) for c, p in zip((1, 1, 0.5, 0.5), parts, strict=True)))


def pooled(seed: int) -> Delta:
    B, A, index = random(seed, 8, 3), random(seed + 1, 8, 2), torch.randint(0, 8, (2, 2), generator=torch.Generator().manual_seed(seed))
    return delta({n: Pooled(B, A, index, index.flip(0), float(i + 1), {"B": "pool.B", "A": "pool.A"}) for i, n in enumerate("uv")})


def test_shared_factors_of_two_deltas_stay_apart_and_are_stored_once_each(tmp_path: Path) -> None:
    a, b = pooled(0), pooled(10)
    both = combine([a, b], [2.0, -1.0])
    size = 2 * (8 * 3 + 8 * 2) * 4  # the pools; indices are beside
    assert both.nbytes == size + 2 * 4 * (2 * 2 * 8)
    store.save(tmp_path / "d", both, "")
    again = scale(store.load(tmp_path / "d", mapped=True), 1.0)
    for name in "uv":
        exact = 2 * change(a, torch.zeros(6, 4), name) - change(b, torch.zeros(6, 4), name)
        assert_close(change(again, torch.zeros(6, 4), name), exact)


def test_what_is_combined_is_saved_as_an_ordinary_delta_that_names_its_parents(tmp_path: Path) -> None:
    for i in (1, 2):
        made = delta({"w": low_rank(i, 6, 5)}, tokenizer="t", training={"steps": i}, hyperparameters={"rank": 2})
        store.save(tmp_path / f"d{i}", made, "")
    a, b = (store.load(tmp_path / f"d{i}") for i in (1, 2))
    whole = negate(combine([a, b], [0.5, 0.25]))
    store.save(tmp_path / "out", whole, "")
    manifest = store.load(tmp_path / "out").manifest
    assert manifest["base"] == BASE["base"] and manifest["tokenizer"] == "t", "what the parents say alike carries over"
    assert "training" not in manifest and manifest["settings"] == {"seed": 3}
    assert [(p["delta"], p["method"]) for p in manifest["lineage"]] == [
        (str(tmp_path / "d1"), "made"), (str(tmp_path / "d2"), "made"), ("(never written)", "combine"),
    ]  # fmt: skip
    assert manifest["lineage"][0]["sha256"] == a.manifest["sha256"] and manifest["lineage"][2]["sha256"] is None
    assert manifest["lineage"][2]["hyperparameters"] == {"coefficients": [0.5, 0.25]} and manifest["method"] == "negate"


# laziness


def resident(kind: str) -> int:
    """Bytes of this process that are in memory: anonymous ones (RssAnon), or pages of files (RssFile)."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found.group(1)) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures resident pages as Linux counts them")
def test_combining_mapped_deltas_reads_no_tensors(tmp_path: Path) -> None:
    names = [f"layers.{i}.w" for i in range(4)]
    for i in (1, 2):
        updates = {n: Dense(random(i, 1024, 1024)) if n != names[0] else low_rank(i, 1024, 1024, 100) for n in names}
        store.save(tmp_path / f"d{i}", delta(updates), "")
    a, b = (store.load(tmp_path / f"d{i}", mapped=True) for i in (1, 2))
    for one in (a, b):  # what loading read to check the hashes
        one.updates.file._map.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
    sums = [combine([a, b], [0.5, 2.0]), scale(a, 3.0), restrict(b, layers=range(4)), chain([a, b])]
    grown = {kind: resident(kind) - size for kind, size in before.items()}
    assert all(len(one.updates) == 4 for one in sums) and max(grown.values()) < 1 << 20, f"{grown} of {2 * a.nbytes:,} bytes"
    with (tmp_path / "d1" / store.TENSORS).open("r+b") as file:
        info = a.updates.file.info(f"{names[1]}:values")  # type: ignore[attr-defined]
        file.seek(info.start)
        file.write(torch.full((1,), 42.0).numpy().tobytes())
    second = float(b.updates[names[1]].values[0, 0])  # type: ignore[attr-defined]
    assert float(sums[0].updates[names[1]].values[0, 0]) == pytest.approx(0.5 * 42 + 2 * second)  # type: ignore[attr-defined]


# refusals


def refused(*said: str) -> Any:
    return pytest.raises(EspalierError, match=".*".join(map(re.escape, said)))


ONE = delta({"w": low_rank(0, 6, 5)})


def whole(update: Update, dtype: str = "BF16") -> Delta:
    return Delta({"w": update}, {"w": Layout((), dtype=dtype)}, dict(BASE))


@pytest.mark.parametrize("update", [
    Replace(torch.zeros(6, 5)),
    Replace(torch.zeros(2), index=torch.tensor([1, 3]), shape=(6, 5)),
    Quantized.of(Replace(random(0, 6, 5)), 4),
    Chain([low_rank(0, 6, 5), Replace(torch.zeros(6, 5))]),
])  # fmt: skip
def test_what_sets_values_cannot_be_scaled_or_summed(update: Update) -> None:
    one = delta({"w": update})
    for make_it, doing in ((lambda: scale(one, 2.0), "scaled by 2.0"), (lambda: negate(one), "scaled by -1.0"), (lambda: add(ONE, one), "added")):
        with refused("w: the form", update.form, "sets values and cannot be", doing, "espalier convert --to dense"):
            make_it()
    assert scale(one, 1.0).updates["w"] is update and chain([ONE, one]).updates["w"].form == "chain"


def test_what_depends_on_the_base_cannot_be_summed_but_chained() -> None:
    one = delta({"w": Magnitude(torch.ones(6), low_rank(0, 6, 5))})
    with refused("w: the form 'magnitude' depends on the base", "chain the deltas"):
        add(ONE, one)
    assert chain([ONE, one]).updates["w"].form == "chain"
    assert add(one, delta({"v": low_rank(0, 6, 5)})).updates["w"].form == "magnitude", "where it stands alone it is as it was"


@pytest.mark.parametrize("one", [whole(Replace(torch.zeros(6, 5))), delta({"w": Replace(torch.zeros(6, 5, dtype=torch.int64))})])
def test_integers_and_tensors_that_are_set_as_a_whole_cannot_be_scaled_or_summed(one: Delta) -> None:
    for make_it in (lambda: negate(one), lambda: add(one, one)):
        with refused("w: the tensor is set as a whole (", "leave it out (algebra.restrict)"):
            make_it()
    assert add(one, delta({"v": low_rank(0, 6, 5)})).updates["w"] is one.updates["w"]


def test_a_tensor_that_is_set_as_a_whole_stands_in_no_chain() -> None:
    one = whole(Replace(torch.zeros(6, 5)))
    with refused("w: the tensor is set as a whole (BF16)", "apply the deltas one after the other"):
        chain([one, one])


@pytest.mark.parametrize(("key", "value", "said"), [("removed", ["old.bias"], "removes the tensor 'old.bias'"), ("files", {"config.json": "0"}, "brings the file 'config.json'")])
def test_removed_tensors_and_files_cannot_be_combined_and_restricting_leaves_them_behind(key: str, value: Any, said: str) -> None:
    one = delta({"w": low_rank(0, 6, 5)}, **{key: value})
    for make_it in (lambda: negate(one), lambda: add(one, ONE), lambda: chain([ONE, one])):
        with refused(said, "restrict the delta"):
            make_it()
    assert set(add(restrict(one, names="*"), ONE).updates) == {"w"}


def test_deltas_of_other_bases_layouts_or_shapes_are_refused() -> None:
    other = delta({"w": low_rank(0, 6, 5)}, base={"name": "y", "fingerprint": "sha256:1"})
    turned = Delta(ONE.updates, {"w": Layout(("w",), transposed=True)}, dict(BASE))
    for join in (lambda d: add(ONE, d), lambda d: chain([ONE, d])):
        with refused("different bases", "sha256:0", "sha256:1"):
            join(other)
        with refused("w: the deltas hold it in different layouts", "transposed=False", "transposed=True"):
            join(turned)
        with refused("w: the deltas hold updates of different shapes, (6, 5) and (7, 5)"):
            join(delta({"w": low_rank(0, 7, 5)}))


def test_wrong_arguments_are_refused_with_what_was_seen() -> None:
    with refused("there are no deltas"):
        add()
    with refused("there are 1 deltas and 2 coefficients"):
        combine([ONE], [1.0, 2.0])
    with refused("a coefficient is nan; it must be a finite number"):
        scale(ONE, math.nan)
    with refused("restrict needs names", "or layers"):
        restrict(ONE)
    with refused("the name 'q*' fits no parameter of the delta, such as w"):
        restrict(ONE, names="q*")
    with refused("the delta updates nothing in layer 2; it has the layers [0, 1, 10]"):
        restrict(delta({name: low_rank(0, 6, 5) for name in NAMES}), layers=range(3))


# documentation


def test_the_snippets_of_the_page_on_deltas_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("first", "second")):
        model = espalier.load("seedling")
        espalier.attach(model, "lora", rank=2, targets="attention", seed=seed)
        with torch.no_grad():
            for number, parameter in enumerate(trainable_parameters(model).values()):
                parameter.add_(random(seed + number, *parameter.shape) * 0.05)
        espalier.save(model, name, base="seedling")
    page = (Path(__file__).parents[1] / "docs" / "deltas.md").read_text()
    exec("\n".join(re.findall(r"^(?:    (.*))$", page, re.MULTILINE)), {})
    first, second, merged = (store.load(Path(name)) for name in ("first", "second", "merged"))
    assert merged.updates.keys() == first.updates.keys() and "first" in Path("merged/README.md").read_text()
    for name, update in merged.updates.items():
        weight = torch.zeros(update.shape)
        share = 0.3 if ".0." in name or ".1." in name else 0.0
        assert_close(change(merged, weight, name), 0.7 * change(first, weight, name) + share * change(second, weight, name))
    espalier.load("seedling", ["merged"])
