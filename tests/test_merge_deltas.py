"""``merge --to delta`` of deltas: LoRA with LoRA into a LoRA, by factors, never dense and without the base."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from mergers import merge_all

from espalier.attach.attachment import attach, trainable_parameters
from espalier.attach.load import load, load_model
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.delta.factors import mean, shared_basis
from espalier.delta.fit import densify, relative_error
from espalier.delta.forms import (
    Dense,
    Factored,
    Kronecker,
    LowRank,
    Magnitude,
    Quantized,
    Sparse,
    Sum,
    Update,
)
from espalier.delta.forms.factored import Start
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError
from espalier.exchange.save import save
from espalier.verbs.apply import apply
from espalier.verbs.convert import convert
from espalier.verbs.diff import diff
from espalier.verbs.merge import merge

BASE = {"name": "nowhere", "fingerprint": "sha256:0"}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int, outputs: int = 12, inputs: int = 10, rank: int = 2, gain: float = 0.5) -> LowRank:
    return LowRank(noise(seed, outputs, rank), noise(seed + 100, rank, inputs), gain)


def stored(folder: Path, updates: dict[str, Update], **manifest: Any) -> str:
    layouts = {name: Layout((name,)) for name in updates}
    store.save(folder, Delta(updates, layouts, {"base": BASE, "method": "made", "hyperparameters": {}, **manifest}), "")
    return str(folder)


def changes(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: densify(update).double() for name, update in store.load(Path(folder)).updates.items()}


def refused(*said: str) -> Any:
    return pytest.raises(EspalierError, match=".*".join(map(re.escape, said)))


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Two LoRAs of different ranks; ``b`` of the second alone."""
    first = {"layers.0.w": factors(1), "layers.1.w": factors(2)}
    second = {"layers.0.w": factors(3, rank=3, gain=2.0), "layers.1.w": factors(4, rank=3), "b": factors(5)}
    return [stored(tmp_path / "one", first), stored(tmp_path / "two", second)]


# exact, by concatenation


@pytest.mark.parametrize(
    ("method", "options", "coefficients"),
    [
        ("linear", {}, [0.5, 0.5]),
        ("linear", {"weights": [3.0, 1.0], "scale": 2.0}, [1.5, 0.5]),
        ("task_arithmetic", {"weights": [0.7, -0.2], "scale": 0.5}, [0.35, -0.1]),
        ("metrics_weighted", {"metrics": [1.0, 3.0]}, [0.75, 0.25]),
    ],
)
def test_a_linear_combination_of_loras_is_the_lora_of_their_ranks_together(
    method: str, options: dict[str, Any], coefficients: list[float], two: list[str], tmp_path: Path
) -> None:
    result = merge(two, str(tmp_path / "m"), method=method, to="delta", quiet=True, **options)
    one, other, made = changes(two[0]), changes(two[1]), changes(tmp_path / "m")
    for name, change in made.items():
        expected = coefficients[0] * one.get(name, torch.zeros(12, 10)) + coefficients[1] * other.get(name, torch.zeros(12, 10))
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6)
    assert set(made) == {*one, *other} and result["error"] == 0 and result["space"] == "updates"
    low = {n: u.low_rank() for n, u in store.load(tmp_path / "m").updates.items()}
    assert {n: f.rank for n, f in low.items() if f is not None} == {"layers.0.w": 5, "layers.1.w": 5, "b": 2}


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_cut_to_a_rank_it_is_the_best_of_that_rank_and_the_error_is_what_was_cut(rank: int, two: list[str], tmp_path: Path) -> None:
    """Eckart and Young: the norm of the singular values that are left out."""
    result = merge(two, str(tmp_path / "m"), method="linear", to="delta", rank=rank, quiet=True)
    one, other, made = changes(two[0]), changes(two[1]), changes(tmp_path / "m")
    lost = whole = 0.0
    for outcome in result["updates"]:
        exact = (one.get(outcome["name"], torch.zeros(12, 10)) + other[outcome["name"]]) / 2
        U, S, Vt = torch.linalg.svd(exact)
        torch.testing.assert_close(made[outcome["name"]], U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-5, atol=1e-5)
        left = float(torch.linalg.vector_norm(S[rank:]))
        assert outcome["error"] == pytest.approx(left / float(torch.linalg.vector_norm(S)), abs=1e-6)
        lost, whole = math.hypot(lost, left), math.hypot(whole, float(torch.linalg.vector_norm(S)))
    assert result["error"] == pytest.approx(lost / whole, abs=1e-6)
    assert all(u.low_rank().rank <= rank for u in store.load(tmp_path / "m").updates.values())  # type: ignore[union-attr]


def test_nothing_dense_is_made_of_factors_however_large_the_matrix(tmp_path: Path) -> None:
    """The dense update would take 4 TB."""
    big = 1_000_000
    deltas = [stored(tmp_path / str(i), {"w": LowRank(noise(i, big, 1), noise(i + 9, 1, big))}) for i in range(2)]
    result = merge(deltas, str(tmp_path / "m"), method="linear", to="delta", rank=1, quiet=True)
    assert 0 < result["error"] < 1 and store.load(tmp_path / "m").updates["w"].low_rank().rank == 1  # type: ignore[union-attr]


def test_other_forms_are_added_in_their_own_forms(tmp_path: Path) -> None:
    sparse = Sparse(noise(1, 3), torch.tensor([1, 40, 90]), (12, 10), 2.0)
    kronecker = Kronecker(noise(2, 1, 3, 2), noise(3, 1, 4, 5))
    deltas = [stored(tmp_path / str(i), {"w": u}) for i, u in enumerate((sparse, kronecker, factors(4), Dense(noise(5, 12, 10))))]
    merge(deltas, str(tmp_path / "m"), method="task_arithmetic", weights=[1, 2, 3, 4], to="delta", quiet=True)
    expected = sum(w * changes(d)["w"] for w, d in enumerate(deltas, 1))
    torch.testing.assert_close(changes(tmp_path / "m")["w"], expected, rtol=1e-5, atol=1e-5)
    merge(deltas, str(tmp_path / "cut"), method="linear", rank=2, to="delta", quiet=True)
    assert store.load(tmp_path / "cut").updates["w"].low_rank().rank == 2  # type: ignore[union-attr]


def test_weights_differ_by_block_and_name_as_in_any_recipe(two: list[str], tmp_path: Path) -> None:
    recipe = f"""
method: task_arithmetic
to: delta
models: [{{path: {two[0]}, weight: 0.5}}, {{path: {two[1]}}}]
parameters: [{{layers: [1, 2], weights: [2.0, null]}}, {{names: b, scale: 0.25}}]
"""
    (tmp_path / "r.yaml").write_text(recipe)
    merge([str(tmp_path / "r.yaml")], str(tmp_path / "m"), quiet=True)
    one, other, made = changes(two[0]), changes(two[1]), changes(tmp_path / "m")
    torch.testing.assert_close(made["layers.0.w"], 0.5 * one["layers.0.w"] + other["layers.0.w"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made["layers.1.w"], 2 * one["layers.1.w"] + other["layers.1.w"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made["b"], 0.25 * other["b"], rtol=1e-5, atol=1e-5)
    merge([str(tmp_path / "m" / "merge.yaml")], str(tmp_path / "again"), quiet=True)
    assert (tmp_path / "m" / store.TENSORS).read_bytes() == (tmp_path / "again" / store.TENSORS).read_bytes()


def test_the_merged_delta_says_what_it_was_made_of(two: list[str], tmp_path: Path) -> None:
    merge(two, str(tmp_path / "m"), method="linear", weights=[2, 1], to="delta", rank=2, quiet=True)
    manifest = store.load(tmp_path / "m").manifest
    assert [p["delta"] for p in manifest["lineage"]] == two and manifest["base"] == BASE and manifest["method"] == "linear"
    assert manifest["hyperparameters"] == {"normalize": True, "weights": [2.0, 1.0], "scale": 1.0, "space": "updates", "rank": 2, "seed": 0}
    assert "Merged by `linear`" in (tmp_path / "m" / "README.md").read_text()


# with a model


def trained(folder: Path, base: Path, seed: int, method: str = "lora", **options: Any) -> str:
    model = load(base)
    attach(model, method, targets="linear", rank=3, seed=options.pop("start", seed), **options)
    with torch.no_grad():
        for number, parameter in enumerate(trainable_parameters(model).values()):
            parameter.add_(noise(100 * seed + number, *parameter.shape) * 0.05)
    save(model, folder, base=str(base))
    return str(folder)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: Any) -> Path:
    root: Path = tmp_path_factory.mktemp("loras")
    tiny("llama").save_pretrained(root / "base")
    for seed in (1, 2):
        trained(root / str(seed), root / "base", seed)
        trained(root / f"dora{seed}", root / "base", seed, "dora", start=0)
    return root


def logits(base: Path, *deltas: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(base, deltas)(tokens()).logits


def test_the_merged_lora_is_the_merge_of_the_models_and_peft_loads_it(loras: Path, tmp_path: Path) -> None:
    deltas = [str(loras / "1"), str(loras / "2")]
    merge(deltas, str(tmp_path / "m"), method="linear", weights=[0.3, 0.7], to="delta", quiet=True)
    apply(str(loras / "base"), [str(tmp_path / "m")], str(tmp_path / "applied"), quiet=True)
    merge(deltas, str(tmp_path / "model"), method="linear", weights=[0.3, 0.7], model=str(loras / "base"), quiet=True)
    one, other = ModelDirectory(tmp_path / "applied"), ModelDirectory(tmp_path / "model")
    for name in other:
        torch.testing.assert_close(one.read(name), other.read(name), rtol=1e-6, atol=1e-6)
    peft = pytest.importorskip("peft")
    convert(str(tmp_path / "m"), str(tmp_path / "peft"), to="peft", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(load_model(loras / "base"), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, logits(loras / "base", tmp_path / "m"), rtol=1e-5, atol=2e-5)


def test_doras_are_averaged_by_their_factors_and_magnitudes_alone(loras: Path, tmp_path: Path, capfd: Any) -> None:
    deltas = [str(loras / "dora1"), str(loras / "dora2")]
    with refused("the form 'magnitude' depends on the base"):
        merge(deltas, str(tmp_path / "none"), method="linear", rank=3, to="delta", quiet=True)
    result = merge(deltas, str(tmp_path / "m"), method="linear", space="factors", to="delta")
    assert result["error"] is None and "not known without the base" in capfd.readouterr().err
    one, other, made = (store.load(Path(d)).updates for d in (*deltas, str(tmp_path / "m")))
    for name, update in made.items():
        assert isinstance(update, Magnitude)
        for key, tensor in update.tensors().items():
            torch.testing.assert_close(tensor, (one[name].tensors()[key] + other[name].tensors()[key]) / 2)
    merge([deltas[0], deltas[0]], str(tmp_path / "same"), method="linear", space="factors", to="delta", quiet=True)
    torch.testing.assert_close(logits(loras / "base", tmp_path / "same"), logits(loras / "base", loras / "dora1"), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_as_deltas_is_merged_as_models_and_that_is_said(loras: Path, tmp_path: Path, capfd: Any) -> None:
    deltas = [str(loras / "1"), str(loras / "2")]
    result = merge(deltas, str(tmp_path / "m"), method="ties", to="delta")
    assert "space" not in result and "ties does not combine updates linearly" in " ".join(capfd.readouterr().err.split())
    apply(str(loras / "base"), [str(tmp_path / "m")], str(tmp_path / "applied"), quiet=True)
    merge(deltas, str(tmp_path / "model"), method="ties", quiet=True)
    for name in (made := ModelDirectory(tmp_path / "model")):
        assert torch.equal(made.read(name), ModelDirectory(tmp_path / "applied").read(name))


# by factors


def test_the_mean_of_factors_is_that_of_a_and_of_b_and_differs_by_the_cross_terms(tmp_path: Path, capfd: Any) -> None:
    """MHR-mu: a bank becomes one adapter of the same size; ``F - D = -sum_i w_i (B_i - B)(A_i - A)``."""
    bank = [factors(i, gain=2.0) for i in range(3)]
    deltas = [stored(tmp_path / str(i), {"w": u}) for i, u in enumerate(bank)]
    result = merge(deltas, str(tmp_path / "m"), method="linear", space="factors", to="delta")
    made = store.load(tmp_path / "m").updates["w"]
    B, A = torch.stack([u.B for u in bank]).mean(0), torch.stack([u.A for u in bank]).mean(0)
    assert isinstance(made, LowRank) and made.rank == 2 and float(made.gain) == 2.0
    torch.testing.assert_close(made.B, B)
    torch.testing.assert_close(made.A, A)
    cross = -2.0 * sum((u.B - B) @ (u.A - A) for u in bank) / 3
    exact = sum(densify(u) for u in bank) / 3
    torch.testing.assert_close(densify(made) - exact, cross, rtol=1e-5, atol=1e-5)
    relative = float(torch.linalg.vector_norm(cross) / torch.linalg.vector_norm(exact))
    assert result["error"] == pytest.approx(relative, rel=1e-5) and relative > 0.1
    assert f"makes {relative:.2%} of the whole" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("count", [2, 5])
def test_cross_terms_of_adapters_that_have_nothing_in_common_are_most_of_what_they_make(count: int) -> None:
    bank = [factors(1000 * i, 400, 300, 8) for i in range(count)]
    made = mean(bank, [1 / count] * count)
    assert relative_error(made, Sum([u.scaled(1 / count) for u in bank])) == pytest.approx(math.sqrt((count - 1) / count), rel=0.05)


def test_adapters_that_share_a_factor_have_no_cross_terms(tmp_path: Path) -> None:
    A = noise(0, 2, 10)
    deltas = [stored(tmp_path / str(i), {"w": LowRank(noise(i + 1, 12, 2), A)}) for i in range(3)]
    result = merge(deltas, str(tmp_path / "m"), method="linear", weights=[1, 2, 3], space="factors", to="delta", quiet=True)
    assert result["error"] < 1e-6


def test_checkpoints_of_a_run_are_averaged_by_their_metrics_in_factor_space(tmp_path: Path) -> None:
    run = [factors(i) for i in range(2)]
    deltas = [stored(tmp_path / str(i), {"w": u}) for i, u in enumerate(run)]
    merge(deltas, str(tmp_path / "m"), method="metrics_weighted", metrics=[1.0, 3.0], space="factors", to="delta", quiet=True)
    made = store.load(tmp_path / "m").updates["w"]
    torch.testing.assert_close(made.tensors()["B"], 0.75 * run[0].B + 0.25 * run[1].B)


def test_the_mean_of_factors_keeps_any_form_whose_positions_agree_and_takes_gains_into_account() -> None:
    index = torch.tensor([1, 40, 90])
    made = mean([Sparse(noise(i, 3), index, (12, 10)) for i in range(2)], [0.25, 0.75])
    torch.testing.assert_close(made.tensors()["values"], 0.25 * noise(0, 3) + 0.75 * noise(1, 3))
    one, other = factors(1, gain=1.0), factors(2, gain=3.0)
    made = mean([one, other], [0.5, 0.5])
    torch.testing.assert_close(densify(made), (one.B + 3 * other.B) @ (one.A + other.A) / 4)
    with refused("one form and rank; these are sparse"):
        mean([Sparse(noise(0, 3), index, (12, 10)), Sparse(noise(0, 3), index + 1, (12, 10))], [0.5, 0.5])


def test_factors_that_do_not_match_are_refused(two: list[str], tmp_path: Path) -> None:
    run: Callable[..., Any] = lambda paths, **more: merge(paths, str(tmp_path / "m"), to="delta", space="factors", quiet=True, **more)  # noqa: E731
    with refused("b: ", "one does not update it; the mean of factors needs those of every delta"):
        run(two, method="linear")
    (tmp_path / "x").mkdir()
    ranks = [stored(tmp_path / "x" / str(rank), {"w": factors(1, rank=rank)}) for rank in (2, 3)]
    with refused("w: the mean of factors is of updates of one form and rank; these are low_rank of rank 2 and low_rank of rank 3"):
        run(ranks, method="linear")
    with refused("coefficients that sum to 1, these are [1.0, 1.0]"):
        run([ranks[0], ranks[0]], method="task_arithmetic")
    with refused("ties does not combine updates linearly"):
        run([ranks[0], ranks[0]], method="ties")
    assert not (tmp_path / "m").exists()


def test_factors_that_are_kept_in_other_forms_are_factors_too(tmp_path: Path) -> None:
    """Compressed LoRA (codes over what A learnt since its start) and LoRA: exact, by the mean, and in a shared basis."""
    start = Start(3, "w")
    coded = Factored(Dense(noise(1, 12, 2)), Quantized.of(Dense(noise(2, 2, 10)), 8, 5), 0.5, start)
    other = Factored(Dense(noise(3, 12, 2)), Quantized.of(Dense(noise(4, 2, 10)), 8, 5), 0.5, start)
    deltas = [stored(tmp_path / name, {"w": u}) for name, u in (("a", coded), ("b", other), ("c", factors(5)))]
    exact = sum(changes(d)["w"] for d in deltas) / 3
    for space, rank in (("updates", None), ("updates", 6), ("svd", None)):
        out = tmp_path / f"{space}{rank}"
        merge(deltas, str(out), method="linear", space=space, rank=rank, to="delta", quiet=True)  # type: ignore[arg-type]
        torch.testing.assert_close(changes(out)["w"], exact, rtol=1e-5, atol=1e-5)
    merge(deltas, str(tmp_path / "mean"), method="linear", space="factors", to="delta", quiet=True)
    low = [u.low_rank() for u in (coded, other, factors(5))]
    B, A = (sum(f.B * f.gain for f in low) / 3, sum(f.A for f in low) / 3)
    torch.testing.assert_close(changes(tmp_path / "mean")["w"], (B @ A).double(), rtol=1e-5, atol=1e-5)


# in a shared basis


def test_a_shared_basis_is_that_of_the_dense_updates_side_by_side() -> None:
    updates = [factors(i, rank=2) for i in range(3)]
    U, held = shared_basis(updates)
    dense = torch.cat([densify(u).double() for u in updates], -1)
    assert U.shape == (12, 6)
    torch.testing.assert_close(U.mT @ U, torch.eye(6).double())
    together = torch.cat(held, -1)  # S V^T
    torch.testing.assert_close(U @ together, dense)
    torch.testing.assert_close(together @ together.mT, torch.diag(torch.linalg.svdvals(dense)[:6].square()))


def test_the_basis_of_one_update_and_its_multiples_is_no_larger_than_its_rank() -> None:
    one = factors(1, rank=2)
    assert shared_basis([one, one.scaled(-3.0), one.scaled(0.5)])[0].shape == (12, 2)


def test_what_is_linear_is_the_same_in_any_basis(two: list[str], tmp_path: Path) -> None:
    for space in ("updates", "svd"):
        merge(two, str(tmp_path / space), method="task_arithmetic", weights=[0.5, 2.0], space=space, to="delta", quiet=True)
    for name, change in changes(tmp_path / "svd").items():
        torch.testing.assert_close(change, changes(tmp_path / "updates")[name], rtol=1e-5, atol=1e-5)


def test_slerp_of_updates_is_the_same_in_a_shared_basis_because_it_keeps_angles(two: list[str], tmp_path: Path) -> None:
    merge(two, str(tmp_path / "m"), method="slerp", of="updates", t=0.3, space="svd", to="delta", quiet=True)
    a, b = (changes(d)["layers.0.w"].float() for d in two)
    expected = merge_all("slerp", {"w": torch.zeros(12, 10)}, [{"w": a}, {"w": b}], of="updates", t=0.3)["w"]
    torch.testing.assert_close(changes(tmp_path / "m")["layers.0.w"].float(), expected, rtol=1e-4, atol=1e-5)


def test_ties_in_a_shared_basis_is_ties_of_the_coefficients(two: list[str], tmp_path: Path) -> None:
    """KnOTS: TIES of S V_i, put back by U; here from the decomposition of the dense updates side by side."""
    merge(two, str(tmp_path / "m"), method="ties", density=0.4, space="svd", to="delta", quiet=True)
    a, b = (changes(d)["layers.0.w"] for d in two)
    U, S, Vt = torch.linalg.svd(torch.cat([a, b], -1), full_matrices=False)
    held = [part.float() for part in (S[:5, None] * Vt[:5]).split(10, -1)]
    merged = merge_all("ties", {"w": torch.zeros_like(held[0])}, [{"w": h} for h in held], density=0.4)["w"]
    torch.testing.assert_close(changes(tmp_path / "m")["layers.0.w"], U[:, :5] @ merged.double(), rtol=1e-4, atol=1e-4)
    with refused("pcb looks at the whole model first"):
        merge(two, str(tmp_path / "p"), method="pcb", space="svd", to="delta", quiet=True)


@pytest.mark.parametrize("method", ["ties", "dare", "della", "breadcrumbs", "sce", "multislerp", "karcher"])
def test_any_method_of_a_parameter_merges_in_a_shared_basis(method: str, two: list[str], tmp_path: Path) -> None:
    result = merge(two, str(tmp_path / "m"), method=method, space="svd", rank=2, to="delta", quiet=True)
    made = changes(tmp_path / "m")
    assert result["space"] == "svd" and all(bool(change.isfinite().all()) and bool(change.any()) for change in made.values())
    assert all(int(torch.linalg.matrix_rank(change, rtol=1e-5)) <= 2 for change in made.values())


def test_experts_are_merged_each_with_its_own_basis(tmp_path: Path) -> None:
    deltas = [stored(tmp_path / str(i), {"w": LowRank(noise(i, 3, 6, 2), noise(i + 9, 3, 2, 5))}) for i in range(2)]
    merge(deltas, str(tmp_path / "m"), method="linear", space="svd", to="delta", quiet=True)
    merge(deltas, str(tmp_path / "cut"), method="linear", rank=3, to="delta", quiet=True)
    exact = sum(changes(d)["w"] for d in deltas) / 2
    torch.testing.assert_close(changes(tmp_path / "m")["w"], exact, rtol=1e-5, atol=1e-5)
    U, S, Vt = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(changes(tmp_path / "cut")["w"], U[..., :3] * S[..., None, :3] @ Vt[..., :3, :], rtol=1e-4, atol=1e-4)


# refusals


def test_what_is_wrong_is_refused_and_nothing_is_left(two: list[str], loras: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "m")
    for options, said in [
        ({"rank": 0, "to": "delta"}, ("rank is 0",)),
        ({"rank": 2}, ("--to delta",)),
        ({"rank": 2, "to": "delta", "dtype": "bf16"}, ("dtype is of the merged model",)),
        ({"space": "updates", "to": "delta", "weights": [1, 1], "normalize": False}, ("sum to 2; where it is not 1, the base itself is multiplied",)),
        ({"space": "updates", "to": "delta", "model": str(loras / "base")}, ("was made for the base 'nowhere'",)),
    ]:
        with refused(*said):
            merge(two, out, method="linear", quiet=True, **options)  # type: ignore[arg-type]
    with refused("is no delta"):
        merge([two[0], str(loras / "base")], out, method="linear", to="delta", rank=2, quiet=True)
    with refused("of different bases"):
        merge([two[0], str(loras / "1")], out, method="linear", to="delta", rank=2, quiet=True)
    exact = str(tmp_path / "exact")
    tiny("llama", seed=3).save_pretrained(tmp_path / "other")
    diff(str(loras / "base"), str(tmp_path / "other"), exact, quiet=True)
    with refused("sets values"):
        merge([exact, str(loras / "1")], out, method="linear", to="delta", rank=2, quiet=True)
    assert not Path(out).exists()


@pytest.mark.parametrize("options", [{"rank": 2}, {"space": "svd"}, {"space": "factors"}])
def test_a_few_bytes_that_stand_for_more_than_memory_are_refused_before_anything_is_made(options: dict[str, Any], tmp_path: Path) -> None:
    huge = Kronecker(noise(1, 1, 2**20, 1), noise(2, 1, 1, 2**20))
    deltas = [stored(tmp_path / str(i), {"w": huge}) for i in range(2)]
    with refused("w: an update of shape (1048576, 1048576) takes", "when it is made dense"):
        merge(deltas, str(tmp_path / "m"), method="linear", to="delta", quiet=True, **options)
    assert not (tmp_path / "m").exists()


# against PEFT


@pytest.fixture(scope="module")
def theirs(loras: Path, tmp_path_factory: Any) -> tuple[Any, Callable[..., dict[str, torch.Tensor]], float]:
    """PEFT with both adapters on, what its ``add_weighted_adapter`` makes of them, and their gain."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in (1, 2):
            convert(str(loras / str(i)), str(root / str(i)), to="peft", quiet=True)
        model = peft.PeftModel.from_pretrained(load_model(loras / "base"), root / "1", adapter_name="1")
        model.load_adapter(root / "2", adapter_name="2")

    def made(kind: str, weights: list[float], **options: Any) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(["1", "2"], weights, "w", combination_type=kind, **options)
        found = {
            name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("w").detach().double()
            for name, module in model.named_modules() if hasattr(module, "get_delta_weight") and "w" in module.lora_A
        }  # fmt: skip
        model.delete_adapter("w")
        return found

    return model, made, float(next(iter(store.load(loras / "1").updates.values())).gain)


def ours(loras: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    merge([str(loras / "1"), str(loras / "2")], str(out), to="delta", quiet=True, **options)
    return changes(out)


def agree(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, change in one.items():
        torch.testing.assert_close(change, other[name], rtol=1e-5, atol=1e-6)


def test_pefts_cat_is_the_exact_combination_and_its_svd_the_cut_one(loras: Path, theirs: Any, tmp_path: Path) -> None:
    made = theirs[1]
    agree(ours(loras, tmp_path / "cat", method="task_arithmetic", weights=[0.3, 0.9]), made("cat", [0.3, 0.9]))
    agree(ours(loras, tmp_path / "svd", method="task_arithmetic", weights=[0.3, 0.9], rank=2), made("svd", [0.3, 0.9], svd_rank=2))


def test_pefts_linear_of_n_adapters_with_equal_weights_is_n_times_the_mean_of_factors(loras: Path, theirs: Any, tmp_path: Path) -> None:
    """It multiplies A and B by the square roots of the weights each: (sum sqrt(w) B)(sum sqrt(w) A)."""
    made = ours(loras, tmp_path / "m", method="linear", space="factors")
    agree(made, {name: change / 2 for name, change in theirs[1]("linear", [0.5, 0.5]).items()})
    agree(made, theirs[1]("linear", [0.25, 0.25]))


def test_pefts_ties_of_dense_updates_is_ties_of_the_updates(loras: Path, theirs: Any) -> None:
    """``ties_svd`` with every direction kept (16 for keys and values; PEFT breaks where the rank is above the matrix's)."""
    one, other = changes(loras / "1"), changes(loras / "2")
    found = theirs[1]("ties_svd", [1.0, 1.0], density=0.5, svd_rank=16)
    for name, change in found.items():
        if min(change.shape) > 16:
            continue
        pair = [{"w": one[name].float()}, {"w": other[name].float()}]
        expected = merge_all("ties", {"w": torch.zeros(change.shape)}, pair, density=0.5)["w"].double()
        close = torch.isclose(change, expected, rtol=1e-4, atol=1e-6)
        assert float((~close).double().mean()) < 0.01, name
