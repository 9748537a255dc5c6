"""The same YAML through mergekit and through us: what is deterministic agrees number by number, what is random in its statistics.

Both compute in float32 and write bf16. Numbers of bf16 models have many equal changes, so a threshold may fall on a tie: an
entry that differs is shown to be one against float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import tiny

from espalier.checkpoint.directory import ModelDirectory
from espalier.errors import EspalierError
from espalier.exchange import mergekit_recipe
from espalier.exchange.merge_recipe import Recipe
from espalier.verbs.merge import merge

mergekit_merge = pytest.importorskip("mergekit.merge")
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32 files", "bf16 files"])
def models(request: Any, tmp_path_factory: Any) -> Path:
    """A base and three fine-tunes of it with something in common, four blocks, 210,000 numbers."""
    root = tmp_path_factory.mktemp("models")
    write_models(root, request.param)
    return root


def write_models(root: Path, dtype: torch.dtype, common: float = 0.02) -> None:
    for number, name in enumerate(("base", "a", "b", "c")):
        model = tiny("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=160, vocab_size=256)
        with torch.no_grad():
            for parameter in model.parameters() if number else []:
                shared, own = (torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) for seed in (9, number))
                parameter += shared * common + own * 0.02
        model.to(dtype).save_pretrained(root / name)


def tensors(folder: Path) -> Tensors:
    directory = ModelDirectory(folder)
    return {name: directory.read(name) for name in directory}


def recipe_of(models: Path, method: str, names: str = "abc", base: bool = True, of: Any = None, **more: Any) -> dict[str, Any]:
    listed = [{"model": str(models / n), **({"parameters": of(i) if callable(of) else of} if of else {})} for i, n in enumerate(names)]
    made = {"models": listed, "merge_method": method, "dtype": "float32", "out_dtype": "bfloat16", **more}
    return {**made, **({"base_model": str(models / "base")} if base else {})}


def both(content: dict[str, Any], folder: Path) -> tuple[Tensors, Tensors]:
    """What mergekit and what we make of a recipe."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    torch.manual_seed(0)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, lazy_unpickle=False, random_seed=0)
    mergekit_merge.run_merge(MergeConfiguration.model_validate(content), str(folder / "theirs"), options)
    merge([str(file)], str(folder / "ours"), quiet=True)
    theirs, ours = tensors(folder / "theirs"), tensors(folder / "ours")
    assert {n: (t.shape, t.dtype) for n, t in theirs.items()} == {n: (t.shape, t.dtype) for n, t in ours.items()}
    return theirs, ours


def ulps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many bf16 numbers lie between two."""
    a, b = (t.view(torch.int16).int() for t in (one, other))
    return (torch.where(a < 0, -32768 - a, a) - torch.where(b < 0, -32768 - b, b)).abs()


def cancels(models: Path, name: str, difference: torch.Tensor) -> torch.Tensor:
    """Where a difference is below what float32 loses of the models' numbers: the result is nearly nothing, so its ulp is too."""
    largest = torch.stack([tensors(models / n)[name].double().abs() for n in ("base", "a", "b", "c")]).amax(0)
    return difference.double().abs() <= largest * 2**-20


def beyond(models: Path, theirs: Tensors, ours: Tensors) -> dict[str, torch.Tensor]:
    """Entries that are more than one bf16 number apart, and not for cancellation."""
    return {n: (ulps(t, ours[n]) > 1) & ~cancels(models, n, t.float() - ours[n].float()) for n, t in theirs.items()}


def weights(number: int) -> dict[str, Any]:
    return {"weight": [0.5, 0.3, 0.4][number]}


def shares(number: int) -> dict[str, Any]:
    return {**weights(number), "density": [0.4, 0.3, 0.5][number]}


FILTERED = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7]}, {"value": 0.5}]
EXACT = {
    "linear": {"method": "linear", "base": False, "of": weights},
    "linear, base as a model": {"method": "linear", "of": weights, "parameters": {"weight": 0.2, "normalize": False}},
    "linear, gradients and filters": {"method": "linear", "base": False, "of": lambda i: {"weight": FILTERED if i else [1, 0.1]}},
    "task arithmetic": {"method": "task_arithmetic", "of": weights, "parameters": {"lambda": 0.8}},
    "task arithmetic, normalized": {"method": "task_arithmetic", "of": weights, "parameters": {"normalize": True}},
    "slerp": {"method": "slerp", "names": "a", "parameters": {"t": FILTERED}},
    "nuslerp": {"method": "nuslerp", "names": "ab", "of": weights},
    "nuslerp, no base": {"method": "nuslerp", "names": "ab", "base": False, "of": weights},
    "nuslerp by rows": {"method": "nuslerp", "names": "ab", "of": weights, "parameters": {"nuslerp_flatten": False}},
    "multislerp": {"method": "multislerp", "of": weights},
    "multislerp, no base": {"method": "multislerp", "base": False, "of": weights},
    "model stock": {"method": "model_stock"},
    "model stock by rows": {"method": "model_stock", "parameters": {"filter_wise": True}},
    "sce, all": {"method": "sce"},
    "karcher": {"method": "karcher", "base": False},
    "karcher, base as a model": {"method": "karcher", "parameters": {"max_iter": 4}},
    "nearswap": {"method": "nearswap", "names": "a", "parameters": {"t": 0.01}},
}  # fmt: skip
BY_THRESHOLD = {
    "ties": {"method": "ties", "of": shares},
    "ties, summed": {"method": "ties", "of": shares, "parameters": {"normalize": False, "lambda": 1.3}},
    "ties, gradients": {"method": "ties", "of": weights, "parameters": {"density": [0.2, 0.9]}},
    "breadcrumbs": {"method": "breadcrumbs", "of": shares, "parameters": {"gamma": 0.1}},
    "breadcrumbs_ties": {"method": "breadcrumbs_ties", "of": shares, "parameters": {"gamma": 0.1}},
}


@pytest.mark.parametrize("case", EXACT)
def test_what_picks_nothing_agrees_to_one_bf16_number(case: str, models: Path, tmp_path: Path) -> None:
    theirs, ours = both(recipe_of(models, **EXACT[case]), tmp_path)
    total = sum(t.numel() for t in theirs.values())
    assert sum(int((ulps(t, ours[n]) > 1).sum()) for n, t in theirs.items()) <= 1e-5 * total
    assert not any(bool(apart.any()) for apart in beyond(models, theirs, ours).values())


@pytest.mark.parametrize("case", BY_THRESHOLD)
def test_what_picks_by_magnitude_agrees_but_where_magnitudes_tie(case: str, models: Path, tmp_path: Path) -> None:
    settings = BY_THRESHOLD[case]
    theirs, ours = both(recipe_of(models, **settings), tmp_path)
    gamma = settings.get("parameters", {}).get("gamma", 0.0)
    apart = beyond(models, theirs, ours)
    if tensors(models / "base")["lm_head.weight"].dtype == torch.float32:  # equal magnitudes are rare
        assert sum(int(a.sum()) for a in apart.values()) <= 1e-5 * sum(a.numel() for a in apart.values())
        return
    base, tuned = tensors(models / "base"), [tensors(models / n) for n in "abc"]
    for name, entries in apart.items():
        magnitudes = [(t[name].double() - base[name].double()).abs() for t in tuned]
        tied = torch.zeros_like(entries)
        for i, magnitude in enumerate(magnitudes):
            given = shares(i)["density"]
            densities = [0.2, 0.9] if "density" in settings.get("parameters", {}) else [given]
            block = int(name.split(".")[2]) if ".layers." in name else 0
            density = densities[0] + (densities[-1] - densities[0]) * block / 3
            order = magnitude.flatten().sort(descending=True).values
            kept, top = max(int(density * len(order)), 1), int(gamma * len(order))
            for limit in {kept + top, top} - {0}:
                tied |= magnitude == order[limit - 1]
        assert not bool((entries & ~tied).any()), f"{name}: {int((entries & ~tied).sum())} entries differ that are no tie"
    assert sum(int(a.sum()) for a in apart.values()) < 0.02 * sum(a.numel() for a in apart.values())


def test_sce_agrees_but_where_variances_tie(models: Path, tmp_path: Path) -> None:
    theirs, ours = both(recipe_of(models, "sce", parameters={"select_topk": 0.3}), tmp_path)
    base, tuned = tensors(models / "base"), [tensors(models / n) for n in "abc"]
    apart = beyond(models, theirs, ours)
    for name, entries in apart.items():
        changes = torch.stack([t[name].double() - base[name].double() for t in tuned])
        variance = changes.var(0, unbiased=False)
        order = variance.flatten().sort(descending=True).values
        limit = float(order[int(int(torch.count_nonzero(variance)) * 0.3) - 1])
        tied = (variance - limit).abs() <= 1e-5 * limit
        # which of the tied are kept moves the energies a little, which shows where the sum nearly cancels
        moved = (theirs[name].double() - ours[name].double()).abs() > changes.abs().amax(0) * 2**-8
        tied |= ~moved
        assert not bool((entries & ~tied).any()), f"{name}: {int((entries & ~tied).sum())} entries differ that are no tie"
    assert sum(int(a.sum()) for a in apart.values()) < 1e-3 * sum(a.numel() for a in apart.values())


def slices_of(models: Path, method: str, parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    made = [
        {**{k: v for k, v in part.items() if k == "parameters"},
         "sources": [{"model": str(models / n), "layer_range": span, **({"parameters": p} if p else {})} for n, span, p in part["from"]]}
        for part in parts
    ]  # fmt: skip
    return {"slices": made, "merge_method": method, "dtype": "float32", "out_dtype": "bfloat16", **more}


STACKS = {
    "passthrough": ("passthrough", [{"from": [("a", [0, 3], None)]}, {"from": [("b", [1, 4], None)]}], {}),
    "passthrough, scaled": (
        "passthrough",
        [{"from": [("a", [0, 2], None)]}, {"from": [("a", [1, 4], {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]})]}],
        {},
    ),
    "linear": (
        "linear",
        [
            {"from": [("a", [0, 2], {"weight": 0.3}), ("b", [2, 4], {"weight": [0.1, 0.9]})]},
            {"from": [("b", [0, 3], {"weight": 1.0}), ("c", [1, 4], {"weight": 0.4})], "parameters": {"normalize": False}},
        ],
        {},
    ),
    "slerp": (
        "slerp",
        [{"from": [("base", [0, 2], None), ("a", [0, 2], None)]}, {"from": [("base", [2, 4], None), ("a", [2, 4], None)]}],
        {"parameters": {"t": FILTERED}, "base_model": "base"},
    ),
    "task arithmetic": (
        "task_arithmetic",
        [
            {"from": [("base", [0, 2], None), ("a", [0, 2], None), ("b", [0, 2], None)], "parameters": {"weight": 0.7}},
            {"from": [("base", [1, 4], None), ("c", [1, 4], {"weight": [0.2, 1.0]})]},
        ],
        {"base_model": "base"},
    ),
    "nuslerp, one slice": ("nuslerp", [{"from": [("a", [0, 4], {"weight": 0.6}), ("b", [0, 4], {"weight": 0.2})]}], {}),
}


@pytest.mark.parametrize("case", STACKS)
def test_slices_agree(case: str, models: Path, tmp_path: Path) -> None:
    method, parts, more = STACKS[case]
    more = {**more, **({"base_model": str(models / "base")} if "base_model" in more else {})}
    theirs, ours = both(slices_of(models, method, parts, **more), tmp_path)
    lost = 2**-25  # a cancelled sum: of numbers below 2, less than what float32 loses of them
    apart = sum(int(((ulps(t, ours[n]) > 1) & ((t.double() - ours[n].double()).abs() > lost)).sum()) for n, t in theirs.items())
    assert apart <= 1e-5 * sum(t.numel() for t in theirs.values())
    configs = [ModelDirectory(tmp_path / folder).config for folder in ("theirs", "ours")]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"] == sum(p["from"][0][1][1] - p["from"][0][1][0] for p in parts)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
def test_random_drops_have_the_same_statistics(method: str, rescale: bool, models: Path, tmp_path: Path) -> None:
    content = recipe_of(models, method, names="a", of={"weight": 1.0, "density": 0.3}, out_dtype="float32", parameters={"rescale": rescale})
    theirs, ours = both(content, tmp_path)
    base, tuned = tensors(models / "base"), tensors(models / "a")
    changes = [torch.cat([(made[n] - base[n].float()).flatten() for n in sorted(base)]).double() for made in (theirs, ours)]
    whole = torch.cat([(tuned[n].float() - base[n].float()).flatten() for n in sorted(base)]).double()
    total = int((whole != 0).sum())
    for kept in changes:  # four standard deviations of a binomial share
        assert abs(int((kept != 0).sum()) / total - 0.3) < 4 * (0.3 * 0.7 / total) ** 0.5
    assert abs(changes[0].mean() - changes[1].mean()) < 5 * whole.std() / total**0.5 / 0.3
    assert float(changes[0].var() / changes[1].var()) == pytest.approx(1, abs=0.03)
    for name in base:
        before = (tuned[name].float() - base[name].float()).abs().sum()
        for made in (theirs, ours) if rescale else ():  # mergekit's rescaling: the sum of magnitudes stays
            assert float((made[name] - base[name].float()).abs().sum() / before) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_random_drops_with_an_election_have_the_same_statistics(method: str, models: Path, tmp_path: Path) -> None:
    content = recipe_of(models, method, of=lambda i: {"weight": 0.5, "density": 0.5}, out_dtype="float32", parameters={"lambda": 0.9})
    theirs, ours = both(content, tmp_path)
    base = tensors(models / "base")
    one, other = (torch.cat([(made[n] - base[n].float()).flatten() for n in sorted(base)]).double() for made in (theirs, ours))
    assert float((one != 0).double().mean()) == pytest.approx(float((other != 0).double().mean()), abs=0.005)
    assert float(one.abs().mean() / other.abs().mean()) == pytest.approx(1, abs=0.02)
    assert float(one.var() / other.var()) == pytest.approx(1, abs=0.03)
    assert abs(float(one.mean() - other.mean())) < 0.02 * float(one.std())


def test_tiny_tensors_keep_their_change_in_both(models: Path, tmp_path: Path) -> None:
    """Versions that cut sorted places as [low:-high] lost all of a tensor with fewer than 1 / gamma numbers; 0.1.5 does not."""
    content = recipe_of(models, "breadcrumbs", names="a", of={"weight": 1.0, "density": 0.9}, parameters={"gamma": 0.01})
    theirs, ours = both(content, tmp_path)
    base, name = tensors(models / "base"), "model.norm.weight"
    assert base[name].numel() < 1 / 0.01
    for made in (theirs, ours):
        changed = int((made[name].float() != base[name].to(torch.bfloat16).float()).sum())
        assert 0.6 * base[name].numel() < changed <= int(0.9 * base[name].numel())


def test_a_tensor_with_less_than_one_number_to_keep_keeps_one_as_in_ties(models: Path, tmp_path: Path) -> None:
    """mergekit keeps int(density n), which is none of a norm's 64 at 1 %: what was learnt there is lost whole. Its own TIES keeps one."""
    (tmp_path / "breadcrumbs").mkdir()
    (tmp_path / "ties").mkdir()
    base, name = tensors(models / "base"), "model.norm.weight"
    changed = {}
    for method in ("breadcrumbs", "ties"):
        made = both(recipe_of(models, method, names="a", of={"weight": 1.0, "density": 0.01}), tmp_path / method)
        changed[method] = [int((found[name].float() != base[name].to(torch.bfloat16).float()).sum()) for found in made]
    assert changed == {"breadcrumbs": [0, 1], "ties": [1, 1]}


def test_models_that_oppose_each_other_give_the_base_in_model_stock(tmp_path: Path) -> None:
    """Their t is negative then, and leads from the base away from both models; the paper's is a share of the way, from 0 to 1."""
    write_models(tmp_path, torch.float32)
    from safetensors.torch import save_file

    base, tuned = tensors(tmp_path / "base"), tensors(tmp_path / "a")
    noise = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) * 0.01 for n, t in base.items()}
    save_file({n: base[n] - 0.8 * (tuned[n] - base[n]) + noise[n] for n in base}, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    content = recipe_of(tmp_path, "model_stock", names="ab", out_dtype="float32")
    theirs, ours = both(content, tmp_path)
    opposed = tensors(tmp_path / "b")
    mean = {n: (tuned[n] + opposed[n]) / 2 for n in base}
    for name in base:
        assert torch.equal(ours[name], base[name])
        assert torch.dist(theirs[name], mean[name]) > 1.5 * torch.dist(base[name], mean[name])


def test_weights_that_sum_to_nothing_are_refused_where_mergekit_passes_over_them(models: Path, tmp_path: Path) -> None:
    content = recipe_of(models, "task_arithmetic", names="ab", of=lambda i: {"weight": [1.0, -1.0][i]}, parameters={"normalize": True})
    with pytest.raises(EspalierError, match="sum to 0"):
        both(content, tmp_path)


REFUSED = {
    "method": ({"merge_method": "arcee_fusion"}, "'arcee_fusion' has no equivalent"),
    "typo": ({"merge_method": "tie"}, "did you mean|ties"),
    "entry": ({"merge_metod": 1}, "'merge_metod' is no entry"),
    "modules": ({"models": None, "modules": {}}, "modules have no equivalent"),
    "parameter": ({"parameters": {"temperature": 1}}, r"parameters\.temperature has no equivalent in ties"),
    "rescale": ({"parameters": {"rescale": True}}, "rescale of ties has no equivalent"),
    "adapter": ({"models": [{"model": "a+b", "parameters": {"weight": 1}}]}, "adapter"),
    "template": ({"chat_template": "chatml"}, "chat_template has no equivalent"),
    "tokens": ({"tokenizer": {"source": "union", "tokens": {}}}, r"tokenizer\.tokens has no equivalent"),
    "dtype": ({"dtype": "float8"}, "dtype is 'float8'"),
    "base": ({"base_model": None}, "ties needs a base_model"),
    "weight": ({"models": [{"model": "a"}]}, "a has no weight, which ties needs"),
    "text": ({"parameters": {"density": "much"}}, "must be a number"),
    "both": ({"slices": []}, "either models or slices"),
    "of a model": ({"models": [{"model": "a", "parameters": {"weight": 1, "normalize": True}}]}, "is of all models"),
    "twice": ({"models": [{"model": "a", "parameters": {"weight": 1}}] * 2}, "listed twice"),
    "by columns": ({"merge_method": "nuslerp", "parameters": {"nuslerp_row_wise": True}}, "arc for each column"),
    "residual": ({"models": None, "slices": [{"sources": [], "residual_weight": 1}]}, "residual_weight has no equivalent"),
    "layer_range": ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [3, 1]}]}]}, "layer_range is"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_equivalent_is_refused_by_name(case: str) -> None:
    changed, message = REFUSED[case]
    content = {"merge_method": "ties", "base_model": "x", "models": [{"model": "a", "parameters": {"weight": 1, "density": 0.5}}], **changed}
    with pytest.raises(EspalierError, match=message) as caught:
        mergekit_recipe.translated({k: v for k, v in content.items() if v is not None}, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ") and "\n" not in str(caught.value)


def test_a_translation_is_a_recipe_with_what_counts_most_last() -> None:
    content = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": "1e-1"}, 0.5]}}, {"model": "b"}],
               "parameters": {"weight": 2}, "tokenizer_source": "union"}  # fmt: skip
    recipe = Recipe.of(mergekit_recipe.translated(content, "it"), "it")
    found = [(override.names, override.weights) for override in recipe.parameters]
    assert found == [(None, [2.0, 2.0]), (None, [0.5, None]), (["*mlp*"], [0.1, None])]
    assert recipe.vocabulary == "union"
