"""``merge search``: candidates are merged into a live model, and the winner is a recipe that makes the same model again."""

from __future__ import annotations

import ast
import fnmatch
import inspect
import json
import math
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import tiny, tokens

from espalier import registry
from espalier.anatomy.structure import anatomy
from espalier.attach.load import load_model, load_tokenizer
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.delta.searching import Gene
from espalier.errors import EspalierError
from espalier.exchange import merge_plan
from espalier.exchange.answers import Answers
from espalier.exchange.block_outputs import block_outputs
from espalier.exchange.live_merge import Live, itself
from espalier.exchange.merge_recipe import Recipe
from espalier.exchange.merge_space import Space
from espalier.exchange.merging import Method
from espalier.memory import language_loss
from espalier.verbs.eval import eval
from espalier.verbs.merge import merge
from espalier.verbs.merge_search import merge_search

EARLY, LATE = (0, 1, 2), (3, 4)


def method_of(name: str) -> Method:
    info = registry.find(name, "merger")
    return Method.of(info, registry.load(info))


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A base: seedling with noise in all blocks; a is without that of early ones, b of late ones, c has more; and texts."""
    root = tmp_path_factory.mktemp("search")
    seedling = ModelDirectory(resolve_model("seedling"))

    def noisy(seed: int, blocks: tuple[int, ...], size: float) -> dict[str, torch.Tensor]:
        made = {}
        for name in seedling:
            tensor = seedling.read(name).clone()
            if tensor.dim() == 2 and any(f"layers.{block}." in name for block in blocks):
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + len(made)))
                tensor = (tensor.float() + noise * tensor.float().std() * size).to(tensor.dtype)
            made[name] = tensor
        return made

    early, late, more = noisy(1, EARLY, 0.4), noisy(1, LATE, 0.4), noisy(2, EARLY + LATE, 0.4)
    clean = noisy(1, (), 0.0)
    base = {n: late[n] if any(f"layers.{b}." in n for b in LATE) else early[n] for n in clean}
    models = {"base": base, "a": late, "b": early, "c": {n: (base[n].float() + more[n].float() - clean[n].float()).to(base[n].dtype) for n in base}}
    for name, content in models.items():
        folder = root / name
        folder.mkdir()
        for file, source in seedling.side_files().items():
            (folder / file).write_bytes(source.read_bytes())
        write_safetensors(folder / "model.safetensors", content)
    (root / "val.txt").write_text(inspect.getsource(textwrap)[3000:4200])
    (root / "more.txt").write_text(inspect.getsource(ast)[2000:3000])
    (root / "select.txt").write_text(inspect.getsource(fnmatch)[1000:2000])
    return root


def paths(root: Path, names: str = "ab") -> list[str]:
    return [str(root / name) for name in names]


def recipe_of(root: Path, names: str = "ab", **entries: Any) -> dict[str, Any]:
    return {"method": "task_arithmetic", "model": str(root / "base"), "models": [{"path": p} for p in paths(root, names)], **entries}


def run(root: Path, out: Path, given: list[str] | dict[str, Any], *, data: str | list[str] = "val.txt", **more: Any) -> dict[str, Any]:
    """A search over models, or over a recipe's entries."""
    if isinstance(given, dict):
        out.parent.mkdir(parents=True, exist_ok=True)
        (out.parent / f"{out.name}.yaml").write_text(yaml.safe_dump(given))
        given = [str(out.parent / f"{out.name}.yaml")]
    data = [str(root / name) for name in ([data] if isinstance(data, str) else data)]
    return merge_search(given, str(out), data, sequence_length=128, quiet=True, **more)


def trials(out: Path) -> list[dict[str, Any]]:
    return [record for line in (out / "trials.jsonl").read_text().splitlines() if "trial" in (record := json.loads(line))]


def loss_of(root: Path, model: Path | str, data: str = "val.txt") -> float:
    return eval(str(model), str(root / data), sequence_length=128, quiet=True)["loss"]


# the space of recipes


def test_open_numbers_are_found_wherever_they_stand() -> None:
    space = Space({
        "method": "ties", "scale": {"search": [0.5, 1.5]}, "options": {"density": {"search": {"range": [0.01, 1], "log": True}}},
        "models": [{"path": "a", "weight": {"depth": [{"search": [0, 1]}, 0.5]}}, {"path": "b"}],
        "parameters": [{"names": "*.mlp.*", "weights": [None, {"search": {"choices": [0.0, 1.0]}}]}],
        "stack": [{"blocks": {0: [0, {"search": {"range": [2, 4], "integer": True}}]}}],
    }, 2, 4)  # fmt: skip
    names = ["scale", "options.density", "models.0.weight.depth.0", "parameters.0.weights.1", "stack.0.blocks.0.1"]
    assert [gene.name for gene in space.genes] == names
    made = space.at([0.5, 0.5, 0.25, 0.9, 0.0])
    assert made["scale"] == 1.0 and made["options"]["density"] == pytest.approx(0.1) and made["models"][0]["weight"] == {"depth": [0.25, 0.5]}
    assert made["parameters"][0]["weights"] == [None, 1.0] and made["stack"][0]["blocks"][0] == [0, 2]
    assert [space.value(made, gene) for gene in space.genes][2:] == [0.25, 1.0, 2]
    Recipe.of(made, "it")


def test_short_forms_stand_for_every_model_and_every_group_of_blocks() -> None:
    override = {"layers": {"every": 2}, "weights": {"each": {"search": [0, 1]}}, "options": {"density": {"each": {"search": [0, 1]}}}}
    space = Space({"method": "dare", "models": [{"path": "a"}, {"path": "b"}], "parameters": [override]}, 2, 5)
    assert [entry["layers"] for entry in space.content["parameters"]] == [[0, 2], [2, 4], [4, 5]]
    assert len(space.genes) == 3 * 2 * 2 and space.genes[0] == Gene("parameters.0.weights.0", 0.0, 1.0)
    Recipe.of(space.at([0.5] * 12), "it")


@pytest.mark.parametrize(("said", "complaint"), [
    ([1, 0], "lower number to a higher"), ([0.0, float("nan")], "lower number"), ([1], "must be one of"), ("x", "must be one of"),
    ({"range": [0, 1], "log": True}, "above 0"), ({"range": [0.5, 2], "integer": True}, "whole numbers"), ({"choices": []}, "must be one of"),
    ({"choices": [1], "log": True}, "must be one of"), ({"grid": [1]}, "must be one of"),
])  # fmt: skip
def test_a_range_that_is_none_is_refused_where_it_stands(said: Any, complaint: str) -> None:
    with pytest.raises(EspalierError, match=rf"^scale: search is .*{complaint}"):
        Space({"scale": {"search": said}}, 1, 1)


def test_groups_and_lists_that_would_grow_without_bounds_are_refused() -> None:
    for every in ({"every": 0}, {"every": 2, "from": 1}):
        with pytest.raises(EspalierError, match="every"):
            Space({"parameters": [{"layers": every}]}, 2, 4)
    node: Any = {"search": [0, 1]}
    for _ in range(12):
        node = {"each": node}
    with pytest.raises(EspalierError, match="more than 1,000,000 entries"):
        Space({"weights": node}, 20, 1)
    for _ in range(40):
        node = [node]
    with pytest.raises(EspalierError, match="32 deep"):
        Space({"weights": node}, 1, 1)
    laughs: Any = [0.5]
    for _ in range(20):
        laughs = [laughs] * 10
    with pytest.raises(EspalierError, match="more than 1,000,000 entries"):
        Space({"weights": laughs}, 1, 1)
    with pytest.raises(EspalierError, match="no model has so many"):
        Space({"parameters": [{"layers": {"every": 2}}]}, 1, 10**9)


# the record


def test_answers_are_heard_again_and_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    first = Answers(tmp_path / "a.jsonl")
    for number in range(3):
        assert first.to(number, lambda n=number: {"found": n / 3})["found"] == number / 3  # type: ignore[misc]
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[:-5])
    second = Answers(tmp_path / "a.jsonl")
    assert len(second.known) == 2 and second.replaying
    for number in range(2):
        assert second.to(number, lambda: pytest.fail("it is known"))["found"] == number / 3
    assert not second.replaying
    second.to(2, lambda: {"found": 2 / 3})
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    with pytest.raises(EspalierError, match=r"a\.jsonl:1 answers another question"):
        Answers(tmp_path / "a.jsonl").to("other", dict)
    (tmp_path / "a.jsonl").write_bytes(b"[]\n" + whole)
    with pytest.raises(EspalierError, match=r"a\.jsonl:1 is no answer"):
        Answers(tmp_path / "a.jsonl")


# the live model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "qwen2_moe", "mixtral", "gpt_oss"])
def test_a_live_model_becomes_what_would_be_written(family: str, tmp_path: Path) -> None:
    for number, name in enumerate(("base", "a", "b")):
        tiny(family, number).save_pretrained(tmp_path / name)
    content = {"method": "ties", "model": str(tmp_path / "base"), "models": [{"path": str(tmp_path / n), "weight": 0.6} for n in "ab"], "scale": 0.7}
    recipe = Recipe.of(content, "it")
    opened = merge_plan.opened(recipe)
    items, _ = merge_plan.items(recipe, opened)
    live = Live(load_model(tmp_path / "base"), items)
    live.require_same(itself(opened), method_of("passthrough"))
    live.become(items, method_of("ties"), 0)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    merge([str(tmp_path / "r.yaml")], str(tmp_path / "written"), quiet=True)
    written = dict(load_model(tmp_path / "written").named_parameters())
    for name, parameter in live.model.named_parameters():
        assert torch.equal(parameter, written[name]), name


def test_only_tensors_whose_numbers_change_are_merged_again(root: Path) -> None:
    def items_of(**entries: Any) -> list[Any]:
        return merge_plan.items(Recipe.of(recipe_of(root, **entries), "it"), opened)[0]

    opened = merge_plan.opened(Recipe.of(recipe_of(root), "it"))
    live = Live(load_model(root / "base"), items_of())
    live.become(items_of(), method_of("task_arithmetic"), 0)
    one = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        for parameter in live.model.parameters():
            parameter.fill_(7.0)
    live.become(items_of(parameters=[{"names": one, "weights": [0.5, 0.0]}]), method_of("task_arithmetic"), 0)
    changed = [name for name, parameter in live.model.named_parameters() if not bool((parameter == 7.0).all())]
    assert changed == [one]
    live.become(items_of(parameters=[{"names": one, "weights": [0.5, 0.0]}]), method_of("ties"), 0)
    assert not any(bool((parameter == 7.0).all()) for parameter in live.model.parameters())


def test_a_model_that_lies_otherwise_in_memory_is_refused(root: Path) -> None:
    opened = merge_plan.opened(Recipe.of(recipe_of(root), "it"))
    items = itself(opened)
    live = Live(load_model(root / "base"), items)
    with torch.no_grad():
        live.model.model.layers[0].mlp.up_proj.weight[3, 5] += 1  # type: ignore[union-attr, operator, index]
    with pytest.raises(EspalierError, match=r"model.layers.0.mlp.up_proj.weight: LlamaForCausalLM lays it out in a way that is not known"):
        live.require_same(items, method_of("passthrough"))
    with pytest.raises(EspalierError, match=r"model.layers.2.mlp.down_proj.weight of LlamaForCausalLM is not in the merged tensors"):
        Live(load_model(root / "base"), [item for item in items if item.name != "model.layers.2.mlp.down_proj.weight"])


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2"])
def test_slopes_are_the_derivatives_by_the_coefficients(family: str, entropy: bool, tmp_path: Path) -> None:
    """dL / d lambda_i^l = <dL / d theta^l, tau_i^l>, against autograd through the sum of all models."""
    for number, name in enumerate(("base", "a", "b")):
        tiny(family, number).save_pretrained(tmp_path / name)
    recipe = Recipe.of({"method": "task_arithmetic", "model": str(tmp_path / "base"), "models": [{"path": str(tmp_path / n), "weight": 0.3} for n in "ab"]}, "it")
    opened = merge_plan.opened(recipe)
    items, _ = merge_plan.items(recipe, opened)
    live = Live(load_model(tmp_path / "base"), items)
    live.become(items, method_of("task_arithmetic"), 0)
    ids = tokens()

    def objective(logits: torch.Tensor) -> torch.Tensor:
        logs = logits[:, :-1].float().log_softmax(-1)
        if entropy:
            return -(logs.exp() * logs).sum(-1).mean()
        return -logs.gather(-1, ids[:, 1:, None]).mean()

    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1).flatten()
    language_loss.install(live.model, 7)
    value = live.model(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets, scale=1 / 22, kind="entropy" if entropy else "cross_entropy")
    value.backward()
    found = live.slopes(items, 1.0)

    base, tuned = dict(load_model(tmp_path / "base").named_parameters()), [dict(load_model(tmp_path / n).named_parameters()) for n in "ab"]
    plain = load_model(tmp_path / "base")
    shares = {name: torch.full((2,), 0.3, requires_grad=True) for name in base}
    theta = {n: base[n].detach() + sum(shares[n][i] * (tuned[i][n] - base[n]).detach() for i in range(2)) for n in base}
    wanted = objective(torch.func.functional_call(plain, theta, (ids,)).logits)
    wanted.backward()
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert len(found) == len(items)
    for name in base:
        parts = [slopes for tensor, slopes in found.items() if live._places[tensor].name == name]
        exact = shares[name].grad
        assert exact is not None and torch.allclose(sum(parts), exact.double(), rtol=1e-3, atol=2e-6), name  # type: ignore[arg-type]


def test_slopes_of_kept_changes_are_those_along_the_trimmed_ones(root: Path) -> None:
    recipe = Recipe.of(recipe_of(root), "it")
    opened = merge_plan.opened(recipe)
    items, _ = merge_plan.items(recipe, opened)
    live = Live(load_model(root / "base"), items)
    for parameter in live.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    name = "model.layers.1.self_attn.o_proj.weight"
    base, a = (read_safetensors(root / n / "model.safetensors")[name].float() for n in ("base", "a"))
    change = (a - base).flatten()
    order = change.abs().sort(descending=True, stable=True).indices[: change.numel() // 5]
    assert float(live.slopes(items, 0.2)[name][0]) == pytest.approx(float(change[order].double().sum()), rel=1e-5, abs=1e-4)


# what wins


def test_the_winner_loses_in_memory_what_it_loses_as_a_file_and_its_recipe_makes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    content = recipe_of(root, method="dare", parameters=[
        {"layers": {"every": 3}, "weights": {"each": {"search": [0, 1]}}, "options": {"density": {"each": {"search": [0.5, 1]}}}},
    ])  # fmt: skip
    result = run(root, tmp_path / "s", content, data=["val.txt", "more.txt"], select=[str(root / "select.txt")], budget=3)
    records = trials(tmp_path / "s")
    assert result["trials"] == 3 and [r["trial"] for r in records] == [1, 2, 3] and len(records[0]["genes"]) == 8
    for data in ("val.txt", "more.txt"):
        assert result["losses"][str(root / data)] == loss_of(root, result["model"], data)
    assert result["selected"] == {str(root / "select.txt"): loss_of(root, result["model"], "select.txt")}
    assert result["loss"] == sum(result["losses"].values()) / 2
    assert result["alone"][str(root / "a")][str(root / "val.txt")] == loss_of(root, root / "a")
    merge([result["recipe"]], str(tmp_path / "again"), quiet=True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (Path(result["model"]) / "model.safetensors").read_bytes()
    report = (tmp_path / "s" / "report.md").read_text()
    assert f"{result['selected'][str(root / 'select.txt')]:.4f}" in report and "parameters.1.options.density.1" in report


def test_the_selection_data_choose_among_the_best_candidates(root: Path, tmp_path: Path) -> None:
    content = recipe_of(root, scale={"search": {"choices": [0.0, 0.5, 1.0]}})
    found = run(root, tmp_path / "s", content, strategy="grid", select=[str(root / "select.txt")], finalists=2, no_model=True)
    asked = [json.loads(line) for line in (tmp_path / "s" / "trials.jsonl").read_text().splitlines()]
    chosen = [r for r in asked if r.get("about", "").startswith("selection")]
    least = min(sum(r["losses"].values()) for r in chosen)
    assert len(chosen) == 2 and sum(found["selected"].values()) == least and found["model"] is None and not (tmp_path / "s" / "model").exists()


def test_relative_losses_count_every_data_set_the_same(root: Path, tmp_path: Path) -> None:
    content = recipe_of(root, scale={"search": {"choices": [0.5, 1.0]}})
    found = run(root, tmp_path / "s", content, strategy="grid", data=["val.txt", "more.txt"], relative=True, no_model=True)
    least = {data: min(found["alone"][path][data] for path in paths(root)) for data in found["losses"]}
    assert found["loss"] == pytest.approx(sum(loss / least[data] for data, loss in found["losses"].items()) / 2, rel=1e-12)


def test_a_search_that_was_killed_goes_on_to_the_same_end(root: Path, tmp_path: Path) -> None:
    content = recipe_of(root, models=[{"path": p, "weight": {"search": [0, 1.5]}} for p in paths(root)])
    whole = run(root, tmp_path / "s", content, budget=9, seed=3)
    record, recipe = (tmp_path / "s" / "trials.jsonl").read_bytes(), (tmp_path / "s" / "recipe.yaml").read_bytes()
    lines = record.splitlines(keepends=True)
    for name in ("recipe.yaml", "report.md"):
        (tmp_path / "s" / name).unlink()
    (tmp_path / "s" / "trials.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:9])
    with pytest.raises(EspalierError, match="go on with it by --resume"):
        run(root, tmp_path / "s", content, budget=9, seed=3)
    with pytest.raises(EspalierError, match="a search with seed 3, this one has 4"):
        run(root, tmp_path / "s", content, budget=9, seed=4, resume=True)
    again = run(root, tmp_path / "s", content, budget=9, seed=3, resume=True)
    assert (tmp_path / "s" / "trials.jsonl").read_bytes() == record and (tmp_path / "s" / "recipe.yaml").read_bytes() == recipe
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert yaml.safe_load(recipe)["seed"] == 3


def test_frank_wolfe_and_adamerging_find_which_model_is_good_in_which_block(root: Path, tmp_path: Path) -> None:
    """a has the good early blocks, b the good late ones, c none: what they make together is better than any."""
    good = loss_of(root, "seedling")
    result = run(root, tmp_path / "fw", paths(root, "abc"), strategy="frank_wolfe", model=str(root / "base"), budget=1, sequences=8)
    single = min(loss[str(root / "val.txt")] for loss in result["alone"].values())
    assert result["method"] == "linear" and result["loss"] < good + 0.25 * (single - good)
    assert result["loss"] == loss_of(root, result["model"])
    learnt = run(root, tmp_path / "ada", paths(root, "abc"), strategy="adamerging", model=str(root / "base"), budget=4, learning_rate=0.1, tries=1, no_model=True)
    losses = [sum(record["losses"].values()) for record in trials(tmp_path / "ada")]
    assert learnt["method"] == "task_arithmetic" and min(losses) == learnt["loss"] < losses[0]
    steps = [r for line in (tmp_path / "ada" / "trials.jsonl").read_text().splitlines() if "slopes" in (r := json.loads(line))]
    assert len(losses) == 2 and len(steps) == 4 and len(steps[0]["slopes"]) == 47


def test_a_greedy_soup_is_never_worse_than_the_best_model(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path / "s", paths(root, "cab"), strategy="greedy_soup")
    assert result["loss"] <= min(loss[str(root / "val.txt")] for loss in result["alone"].values())
    recipe = yaml.safe_load((tmp_path / "s" / "recipe.yaml").read_text())
    assert recipe["method"] == "linear" and {m["weight"] for m in recipe["models"]} <= {0.0, 1.0} and "model" not in recipe


def test_the_first_path_is_the_first_model_and_the_winner_is_a_stack(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path / "s", paths(root), strategy="evolve_path", budget=4, repeats=1, population=3)
    records = trials(tmp_path / "s")
    assert records[0]["losses"][str(root / "val.txt")] == loss_of(root, root / "a")
    assert result["loss"] == loss_of(root, result["model"])
    recipe = yaml.safe_load((tmp_path / "s" / "recipe.yaml").read_text())
    assert recipe["method"] == "passthrough" and len(recipe["stack"]) == load_model(result["model"]).config.num_hidden_layers
    best = min(records, key=lambda r: sum(r["losses"].values()))
    assert result["losses"] == best["losses"]


# the stream


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "qwen2_moe"])
def test_dividing_what_blocks_add_is_scaling_the_stream(family: str, tmp_path: Path) -> None:
    """Multiplying the stream by s_t before block t, as #42 does, against a stack whose outputs are divided by s_1 ... s_t."""
    tiny(family, 1, num_hidden_layers=3, **({"rms_norm_eps": 1e-12} if family not in ("gpt2", "gpt_neox") else {})).save_pretrained(tmp_path / "a")
    model = load_model(tmp_path / "a")
    globs = block_outputs(model, list(ModelDirectory(tmp_path / "a")))
    by, path, total = (1.3, 0.6, 0.8, 1.7), (2, 0, 1, 1), 1.0
    parts, overrides = [], []
    for part, (factor, block) in enumerate(zip(by, path, strict=True)):
        total *= factor
        parts.append({"blocks": {0: [block, block + 1]}})
        overrides.append({"part": part, "names": globs, "scale": 1 / total})
    content = {"method": "passthrough", "models": [{"path": str(tmp_path / "a")}], "stack": parts, "model": str(tmp_path / "a")}
    made = {}
    for name, more in (("scaled", {"parameters": overrides}), ("plain", {})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**content, **more}))
        merge([str(tmp_path / f"{name}.yaml")], str(tmp_path / name), quiet=True)
        made[name] = load_model(tmp_path / name)
    ids = tokens()
    without = made["plain"](ids).logits
    for factor, block in zip(by, anatomy(made["plain"]).blocks, strict=True):
        made["plain"].get_submodule(block.path).register_forward_pre_hook(lambda _, given, by=factor: (given[0] * by, *given[1:]))
    wanted = made["plain"](ids).logits
    assert (made["scaled"](ids).logits - wanted).abs().max() < 2e-3 * (wanted - without).abs().max()


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_scales_are_refused_where_blocks_norm_what_they_add(family: str) -> None:
    model = tiny(family)
    with pytest.raises(EspalierError, match="--spread 0"):
        block_outputs(model, [name for name, _ in model.named_parameters()])


# what is wrong


@pytest.mark.parametrize(("more", "complaint"), [
    ({}, "leaves nothing open for cma to choose"),
    ({"strategy": "greedy_soup", "scale": {"search": [0, 1]}}, "greedy_soup chooses by itself; .* leaves scale open"),
    ({"strategy": "gready_soup"}, "did you mean 'greedy_soup'"),
    ({"scale": {"search": [0, 1]}, "budget": 0}, "budget is 0"),
    ({"scale": {"search": [0, 1]}, "finalists": 0}, "finalists is 0"),
    ({"scale": {"search": [0, 1]}, "to": "delta"}, "a search makes models"), ({"scale": {"search": [0, 1]}, "space": "factors"}, "a search makes models"),
    ({"scale": {"search": [0, 1]}, "parameters": [{"names": "nothing.*"}]}, "no tensor of the new model fits"),
    ({"scale": {"search": [0, 1]}, "density": 0.5}, "density is no option of task_arithmetic"),
    ({"models": []}, "models: it must be a list"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_tried(more: dict[str, Any], complaint: str, root: Path, tmp_path: Path) -> None:
    entries = {key: value for key, value in more.items() if key in Recipe.model_fields}
    with pytest.raises(EspalierError, match=complaint):
        run(root, tmp_path / "s", recipe_of(root, **entries), **{k: v for k, v in more.items() if k not in entries})
    assert not list(tmp_path.glob("s/recipe.yaml"))


def test_the_same_data_may_not_try_and_select(root: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="what chooses the winner must be other data"):
        run(root, tmp_path / "s", paths(root), method="linear", select=[str(root / "val.txt")])


def test_a_candidate_that_cannot_be_merged_loses_without_end(root: Path, tmp_path: Path) -> None:
    content = recipe_of(root, method="linear", models=[{"path": p, "weight": {"search": {"choices": [1.0, -1.0]}}} for p in paths(root)])
    found = run(root, tmp_path / "s", content, strategy="grid", no_model=True)
    records = trials(tmp_path / "s")
    assert [r["losses"][str(root / "val.txt")] is None for r in records] == [False, True, True, False] and "sum to 0" in records[1]["about"]
    assert math.isfinite(found["loss"])


def test_candidates_that_cannot_be_merged_are_no_finalists(root: Path, tmp_path: Path) -> None:
    content = recipe_of(root, method="linear", models=[{"path": p, "weight": {"search": {"choices": [1.0, -1.0]}}} for p in paths(root)])
    found = run(root, tmp_path / "s", content, strategy="grid", select=[str(root / "select.txt")], no_model=True)
    assert math.isfinite(found["loss"]) and math.isfinite(found["selected"][str(root / "select.txt")])


@pytest.mark.parametrize(("more", "named"), [({"method": "ties"}, "--method"), ({"density": 0.3}, "--density")])
def test_a_strategy_that_takes_its_own_method_refuses_another(more: dict[str, Any], named: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=f"greedy_soup chooses the method .* leave out {named}"):
        run(root, tmp_path / "s", paths(root), strategy="greedy_soup", **more)


def test_a_model_whose_loss_is_no_number_is_named(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("espalier.verbs._merge_problem.score", lambda *_, **__: types.SimpleNamespace(loss=float("nan")))
    with pytest.raises(EspalierError, match=r"alone: \S+a: the loss on \S+val.txt is nan"):
        run(root, tmp_path / "s", paths(root), method="linear")


def test_the_command_line_searches_weights_of_models_without_a_recipe(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "espalier", "merge", "search", *paths(root), "--method", "ties", "--density", "0.5", "--model", str(root / "base")]
    command += ["--data", str(root / "val.txt"), "--strategy", "random_search", "--budget", "2", "--out", str(tmp_path / "s"), "--json", "--sequence-length", "128", "--no-model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    recipe = yaml.safe_load((tmp_path / "s" / "recipe.yaml").read_text())
    assert result["method"] == recipe["method"] == "ties" and recipe["options"]["density"] == 0.5 and result["trials"] == 2
    assert all(0 <= m["weight"] <= 1 for m in recipe["models"])


def test_deltas_are_merged_like_models(root: Path, tmp_path: Path) -> None:
    from espalier.verbs.diff import diff

    for name in "ab":
        diff(str(root / "base"), str(root / name), str(tmp_path / name), quiet=True)
    found = run(root, tmp_path / "s", [str(tmp_path / "a"), str(tmp_path / "b")], strategy="random_search", method="task_arithmetic", budget=1)
    assert found["alone"][str(tmp_path / "a")][str(root / "val.txt")] == pytest.approx(loss_of(root, root / "a"), abs=1e-6)
    assert found["loss"] == loss_of(root, found["model"])
    load_tokenizer(found["model"])


def test_the_path_goes_through_deltas_of_a_base_that_has_moved(root: Path, tmp_path: Path) -> None:
    from espalier.verbs.diff import diff

    shutil.copytree(root / "base", tmp_path / "base")
    for name in "ab":
        diff(str(tmp_path / "base"), str(root / name), str(tmp_path / name), quiet=True)
    (tmp_path / "base").rename(tmp_path / "moved")
    deltas = [str(tmp_path / name) for name in "ab"]
    found = run(root, tmp_path / "s", deltas, strategy="evolve_path", model=str(tmp_path / "moved"), budget=1)
    assert found["loss"] == pytest.approx(loss_of(root, root / "a"), abs=1e-6) and found["loss"] == loss_of(root, found["model"])
