"""``merge report``: every statistic against its definition on whole tensors, the loss along lines, and what is said of them."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, config, tiny
from mergers import Held, tensors
from mergers import checkpoint as save

from espalier.anatomy.parameters import parameters, role_of
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.errors import EspalierError
from espalier.exchange import merge_line, merge_plan, merge_plots, merge_statistics
from espalier.exchange.live_merge import Live
from espalier.exchange.merge_recipe import Recipe
from espalier.exchange.merge_report import INDEPENDENT, ONE_BASE, names_of
from espalier.verbs.diff import diff
from espalier.verbs.eval import eval
from espalier.verbs.merge import merge
from espalier.verbs.merge_report import merge_report

Tensors = dict[str, torch.Tensor]
TEXT = "def double(x):\n    return 2 * x\n" * 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Path:
    """A base with the tokenizer of seedling, three fine-tunes of it (bf16), and the first as a delta."""
    root = tmp_path_factory.mktemp("models")
    vocabulary = ModelDirectory(resolve_model("seedling")).config["vocab_size"]
    for number, name in enumerate(("base", "a", "b", "c")):
        model = tiny("llama", vocab_size=vocabulary, num_hidden_layers=2)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for tensor in model.parameters() if number else ():
                tensor += torch.randn(tensor.shape, generator=generator) * 0.01 * number
        model.to(torch.bfloat16).save_pretrained(root / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(resolve_model("seedling") / file, root / name / file)
    diff(str(root / "base"), str(root / "a"), str(root / "delta-a"), quiet=True)
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="module")
def report(models: Path) -> dict[str, Any]:
    """Of a delta and two checkpoints."""
    return merge_report([str(models / name) for name in ("delta-a", "b", "c")], density=0.1, rank=4, quiet=True)


def small(folder: Path, changes: list[Tensors], base: Tensors) -> list[str]:
    """Checkpoints of a base and of the base plus each of the changes; the base first."""
    paths = [str(save(folder / "base", base))]
    return paths + [str(save(folder / f"m{i}", {n: base[n] + c[n] for n in base})) for i, c in enumerate(changes)]


# statistics


def expected(x: torch.Tensor, y: torch.Tensor, density: float) -> dict[str, float]:
    """The statistics of two changes of one tensor, from their definitions, in float64."""
    x, y = x.double().flatten(), y.double().flatten()
    count = max(1, int(density * len(x)))
    tops = [set(v.abs().sort(descending=True, stable=True).indices[:count].tolist()) & set(v.nonzero().flatten().tolist()) for v in (x, y)]
    both = sorted(tops[0] & tops[1])
    opposed = (x * y) < 0
    trimmed = [torch.zeros_like(v) for v in (x, y)]
    for made, v, top in zip(trimmed, (x, y), tops, strict=True):
        made[sorted(top)] = v[sorted(top)]
    loser = torch.where(opposed, torch.minimum(x.abs(), y.abs()), 0.0)
    loser_kept = torch.where(trimmed[0] * trimmed[1] < 0, torch.minimum(trimmed[0].abs(), trimmed[1].abs()), 0.0)
    return {
        "cosine": float(x @ y / x.norm() / y.norm()),
        "overlap": len(both) / len(tops[0] | tops[1]),
        "sign_conflict": float(opposed.sum() / ((x != 0) & (y != 0)).sum()),
        "sign_conflict_kept": float(opposed[both].double().mean()),
        "lost": float(loser.sum() / (x.abs().sum() + y.abs().sum())),
        "lost_kept": float(loser_kept.sum() / sum(t.abs().sum() for t in trimmed)),
    }


def test_statistics_of_every_tensor_are_those_of_whole_tensors_in_float64(report: dict[str, Any], models: Path) -> None:
    base, b, c = (tensors(models / name) for name in ("base", "b", "c"))
    a = tensors(models / "a")
    of = {"delta-a": a, "b": b, "c": c}
    for pair in report["pairs"]:
        for name, found in pair["tensors"].items():
            x, y = (of[pair[side]][name].float() - base[name].float() for side in "ab")
            for key, value in expected(x, y, 0.1).items():
                none = key == "sign_conflict_kept" and found["overlap"] == 0
                assert found[key] is None if none else found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, key)
            first, second = (of[pair[side]][name].double() for side in "ab")
            assert found["distance"] == pytest.approx(float((first - second).norm() / (first.norm() + second.norm()) * 2), rel=1e-6)
            assert found["model_cosine"] == pytest.approx(float((first * second).sum() / first.norm() / second.norm()), rel=1e-6)
    for model in report["models"]:
        for name, found in model["tensors"].items():
            change = (of[model["name"]][name].float() - base[name].float()).double()
            top = change.flatten().abs().sort(descending=True).values[: max(1, int(0.1 * change.numel()))]
            assert found["norm"] == pytest.approx(float(of[model["name"]][name].double().norm()), rel=1e-6)
            assert found["change"] == pytest.approx(float(change.norm()), rel=1e-6)
            assert found["relative"] == pytest.approx(float(change.norm() / base[name].double().norm()), rel=1e-6)
            assert found["changed"] == pytest.approx(float((change != 0).double().mean()), rel=1e-9)
            assert found["kept_energy"] == pytest.approx(float(top.square().sum() / change.square().sum()), rel=1e-5)


def test_a_role_a_block_and_the_total_are_of_all_their_entries_together(report: dict[str, Any], models: Path) -> None:
    base, a, b = (tensors(models / name) for name in ("base", "a", "b"))
    pair = report["pairs"][0]
    groups = {
        ("roles", "mlp.up"): [n for n in base if ".up_proj." in n],
        ("roles", "norm"): [n for n in base if "norm" in n],
        ("blocks", "1"): [n for n in base if ".layers.1." in n],
        ("blocks", "outside"): [n for n in base if ".layers." not in n],
        ("total",): list(base),
    }
    for where, names in groups.items():
        found = pair[where[0]] if len(where) == 1 else pair[where[0]][where[1]]
        x, y = (torch.cat([(model[n].float() - base[n].float()).flatten() for n in names]) for model in (a, b))
        whole = expected(x, y, 0.1)
        for key in ("cosine", "sign_conflict", "lost"):
            assert found[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-7), (where, key)
    assert set(pair["roles"]) == {"head", "embedding", "norm", *(f"attention.{p}" for p in "qkvo"), *(f"mlp.{p}" for p in ("gate", "up", "down"))}
    assert list(pair["blocks"]) == ["0", "1", "outside"]


def test_what_the_election_of_all_models_drops_is_the_magnitude_of_the_lighter_side(report: dict[str, Any], models: Path) -> None:
    base = tensors(models / "base")
    changes = [torch.cat([(t.float() - base[n].float()).double().flatten() for n, t in tensors(models / name).items()]) for name in "abc"]
    stacked = torch.stack(changes)
    lighter = torch.minimum(stacked.clamp_min(0).sum(0), -stacked.clamp_max(0).sum(0))
    assert report["election"]["lost"] == pytest.approx(float(lighter.sum() / stacked.abs().sum()), rel=1e-6)


def test_singular_subspaces_are_those_of_the_whole_decomposition(report: dict[str, Any], models: Path) -> None:
    base, a, b = (tensors(models / name) for name in ("base", "a", "b"))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        found = report["pairs"][0]["tensors"][name]
        (U, S, Vh), (X, T, Yh) = (torch.linalg.svd((m[name].float() - base[name].float()).double(), full_matrices=False) for m in (a, b))
        assert found["left_overlap"] == pytest.approx(float((U[:, :4].T @ X[:, :4]).square().sum() / 4), rel=1e-6)
        assert found["right_overlap"] == pytest.approx(float((Vh[:4] @ Yh[:4].T).square().sum() / 4), rel=1e-6)
        assert found["right_chance"] == pytest.approx(4 * 4 / base[name].shape[1] / 4)
        cosines = torch.linalg.svdvals(Vh[:4] @ Yh[:4].T)
        assert found["angles"]["right"] == pytest.approx(cosines.clamp_max(1).acos().rad2deg().tolist(), abs=1e-4)
        p, q = int((0.3 * S[0] < S).sum()), int((0.3 * T[0] < T).sum())
        R = ((U.T @ X) * (Vh @ Yh.T))[:p, :q].sum() / max(p, q)
        assert found["alignment"] == pytest.approx(float(R), abs=1e-6)


def planted(rows: int, columns: int, seed: int, noise: float) -> torch.Tensor:
    """A matrix of rank 4 with singular values 8, 4, 2 and 1, and noise."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in (rows, columns))
    return U @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ V.T + noise * torch.randn(rows, columns, generator=generator)


def held(*changes: torch.Tensor) -> Held:
    return Held(torch.zeros_like(changes[0]), changes, [1.0] * len(changes), 1.0, "w", 0, None)


def test_the_block_power_method_finds_the_directions_of_a_matrix_that_is_not_decomposed_as_a_whole() -> None:
    change = planted(700, 600, 1, 0.002)
    assert change.numel() > merge_statistics.EXACT
    (found,) = merge_statistics.leading(held(change), "updates", 4, [float(change.double().square().sum())], 0, 700)
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    assert torch.allclose(found.S[:4], S[:4], rtol=1e-5)
    assert float((found.U[:, :4].T @ U[:, :4]).square().sum()) == pytest.approx(4, abs=1e-4)
    assert float((found.V[:, :4].T @ Vh[:4].T).square().sum()) == pytest.approx(4, abs=1e-4)


def test_changes_without_structure_that_have_nothing_to_do_with_each_other_overlap_by_chance_alone() -> None:
    """Had both the same random start, what the block power method finds of them would be alike."""
    one, other = (torch.randn(700, 600, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = merge_statistics.Found({"changes": torch.diag(torch.stack([one, other, one]).double().square().sum((1, 2)))})
    merge_statistics._compare_directions(held(one, other, one), "updates", 16, found)
    for side, size in (("left", 700), ("right", 600)):
        overlap = found.counts[side] / found.counts["directions"]
        assert float(overlap[0, 1]) < 2 * 16 / size
        assert float(overlap[0, 2]) == pytest.approx(1, abs=1e-6)
    assert float(found.counts["aligned"][0, 2] / found.counts["aligned_of"][0, 2]) == pytest.approx(1, abs=1e-6)


def test_every_expert_of_a_fused_tensor_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.down_proj"
    changes = [torch.randn(3, 8, 6, generator=generator) * 0.1 for _ in range(2)]
    paths = small(tmp_path, [{name: c} for c in changes], {name: torch.zeros(3, 8, 6)})
    found = merge_report(paths[1:], model=paths[0], rank=2, quiet=True)["pairs"][0]
    total = 0.0
    for x, y in zip(*changes, strict=True):
        U, X = (torch.linalg.svd(m.double()).U[:, :2] for m in (x, y))
        total += float((U.T @ X).square().sum())
    assert found["total"]["left_overlap"] == pytest.approx(total / 6, rel=1e-6)
    assert list(found["roles"]) == ["experts.down"] and "angles" not in found["tensors"][name]


def test_a_model_compared_with_itself_agrees_in_everything(models: Path) -> None:
    found = merge_report([str(models / "a"), str(models / "a")], model=str(models / "base"), data=[str(models / "text.txt")], points=3, rank=4, quiet=True)
    (pair,) = found["pairs"]
    for where in (pair["total"], *pair["tensors"].values()):
        assert where["distance"] == 0 and where["sign_conflict"] == where["sign_conflict_kept"] == where["lost"] == where["lost_kept"] == 0
        assert where["cosine"] == pytest.approx(1, abs=1e-9) and where["overlap"] == 1
    assert pair["total"]["alignment"] == pytest.approx(1, abs=1e-6) and pair["total"]["left_overlap"] == pytest.approx(1, abs=1e-6)
    assert max(pair["tensors"]["model.layers.0.mlp.up_proj.weight"]["angles"]["left"]) < 1e-4
    assert pair["verdict"] == "the same weights" and found["lines"][0]["barrier"] == 0
    assert len(set(found["lines"][0]["losses"])) == 1
    assert {line["b"] for line in found["lines"]} == {"a (1)", "a (2)"}


def test_a_change_and_its_opposite_conflict_everywhere(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"model.layers.0.mlp.up_proj.weight": torch.zeros(12, 10)}
    change = {n: torch.randn(t.shape, generator=generator) for n, t in base.items()}
    paths = small(tmp_path, [change, {n: -t for n, t in change.items()}], base)
    total = merge_report(paths[1:], model=paths[0], rank=3, quiet=True)["pairs"][0]["total"]
    assert total["sign_conflict"] == total["sign_conflict_kept"] == total["overlap"] == 1
    assert total["cosine"] == pytest.approx(-1) and total["lost"] == pytest.approx(0.5) and total["alignment"] == pytest.approx(-1)


def test_entries_that_did_not_change_are_never_among_the_largest(tmp_path: Path) -> None:
    base = {"w.weight": torch.ones(4, 10)}
    one, other = torch.zeros(4, 10), torch.zeros(4, 10)
    one[0, :2], other[3, :2] = 1.0, 1.0
    paths = small(tmp_path, [{"w.weight": one}, {"w.weight": other}], base)
    total = merge_report(paths[1:], model=paths[0], density=0.5, quiet=True)["pairs"][0]["total"]
    assert total["overlap"] == 0 and total["sign_conflict"] is None and total["cosine"] == 0


def test_without_a_base_the_models_themselves_are_compared_and_it_is_said_what_needs_one(models: Path, tmp_path: Path) -> None:
    found = merge_report([str(models / name) for name in "ab"], rank=4, out=str(tmp_path / "out"), quiet=True)
    total = found["pairs"][0]["total"]
    assert found["of"] == "models" and found["base"] is None and "sign_conflict" not in total and "cosine" not in total
    a, b = (torch.cat([t.double().flatten() for t in tensors(models / name).values()]) for name in "ab")
    assert total["model_cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-6)
    assert total["distance"] == pytest.approx(float((a - b).norm() / (a.norm() + b.norm()) * 2), rel=1e-6)
    assert any("--model BASE" in note for note in found["notes"])
    assert total["left_overlap"] > 0.9  # of weights that are nearly the same
    assert sorted(p.name for p in (tmp_path / "out" / "plots").iterdir()) == ["pairs.png", "subspaces.png"]


def test_the_report_is_the_same_for_any_number_of_threads(report: dict[str, Any], models: Path) -> None:
    for threads in (1, 3):
        again = merge_report([str(models / name) for name in ("delta-a", "b", "c")], density=0.1, rank=4, threads=threads, quiet=True)
        assert again == report


@pytest.mark.parametrize("family", FAMILIES)
def test_the_role_of_a_name_is_that_of_the_module(family: str) -> None:
    """In every family; a module that is a norm by its class alone is not known by its name."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(family))
    for target in parameters(model):
        assert role_of(target.name) == target.role, target.name


# the line


def test_losses_along_the_line_are_those_of_merged_checkpoints_and_the_barrier_is_their_rise(models: Path, tmp_path: Path) -> None:
    text, given = str(models / "text.txt"), [str(models / "delta-a"), str(models / "c")]
    found = merge_report(given, data=[text], points=5, rank=0, sequence_length=32, quiet=True)
    line = found["lines"][0]
    assert line["points"] == [0, 0.25, 0.5, 0.75, 1] and [(x["a"], x["b"]) for x in found["lines"]] == [("delta-a", "c"), ("base", "delta-a"), ("base", "c")]
    merge(given, str(tmp_path / "m"), method="linear", weights=[0.75, 0.25], quiet=True)
    wanted = {0: str(models / "a"), 1: str(tmp_path / "m"), 4: str(models / "c")}
    losses = {place: eval(path, text, sequence_length=32, quiet=True)["loss"] for place, path in wanted.items()}
    assert line["losses"][0] == losses[0] and line["losses"][4] == losses[4]
    assert line["losses"][1] == pytest.approx(losses[1], rel=1e-4)
    above = [loss - (1 - a) * line["losses"][0] - a * line["losses"][-1] for a, loss in zip(line["points"], line["losses"], strict=True)]
    assert line["barrier"] == pytest.approx(max(above), abs=1e-12) and above[line["points"].index(line["at"])] == pytest.approx(line["barrier"], abs=1e-12)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral", "gpt_oss"])
def test_a_live_model_becomes_what_is_on_disk_in_any_layout(family: str, tmp_path: Path) -> None:
    """Tied heads, matrices stored transposed, and files with a tensor for each expert."""
    made = []
    for seed in (0, 1):
        model = tiny(family)
        with torch.no_grad():
            for number, tensor in enumerate(model.parameters()):
                tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        model.save_pretrained(tmp_path / str(seed))
        made.append(model)
    recipe = Recipe.of({"method": "linear", "models": [{"path": str(tmp_path / str(seed))} for seed in (0, 1)]}, "it")
    opened = merge_plan.opened(recipe)
    items, _ = merge_plan.items(recipe, opened)
    live = Live(tiny(family), items)
    for share in (0.0, 1.0, 0.25):
        merge_line.become(live, items, 0, 1, share)
        for (name, found), first, second in zip(live.model.named_parameters(), made[0].parameters(), made[1].parameters(), strict=True):
            assert torch.equal(found, (1 - share) * first + share * second), name


def test_a_live_model_of_other_shapes_is_refused(models: Path) -> None:
    recipe = Recipe.of({"method": "linear", "models": [{"path": str(models / name)} for name in "ab"]}, "it")
    items, _ = merge_plan.items(recipe, merge_plan.opened(recipe))
    with pytest.raises(EspalierError, match=r"it is .* in the files, and .* in LlamaForCausalLM"):
        Live(tiny("llama"), items)


# the judgement


def trained(seed: int, steps: int, start: torch.nn.Module | None = None, shift: int = 0) -> torch.nn.Module:
    """A tiny model that was trained on sequences that count up."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config("llama"))
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if start is None else 5e-4)
    for _ in range(steps):
        ids = (torch.randint(0, 90, (8, 1)) + torch.arange(16) * (1 + shift)) % 96
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_fine_tunes_of_one_base_and_models_trained_apart_are_told_from_each_other(tmp_path: Path) -> None:
    base, apart = trained(0, 60), trained(1, 60)
    fine = [trained(seed, 20, base, shift) for seed, shift in ((2, 0), (3, 1))]
    for name, model in {"base": base, "apart": apart, "one": fine[0], "two": fine[1]}.items():
        model.save_pretrained(tmp_path / name)
    found = merge_report([str(tmp_path / n) for n in ("one", "two", "apart")], rank=0, quiet=True)
    verdicts = {(p["a"], p["b"]): (p["verdict"], p["total"]["matrix_cosine"]) for p in found["pairs"]}
    assert verdicts["one", "two"][0] == "fine-tunes of one base" and verdicts["one", "two"][1] > ONE_BASE
    for name in ("one", "two"):
        assert verdicts[name, "apart"][0] == "independently trained" and abs(verdicts[name, "apart"][1]) < INDEPENDENT / 2
    assert sum("match first (espalier merge match)" in note for note in found["notes"]) == 2
    wrong = merge_report([str(tmp_path / n) for n in ("one", "two")], model=str(tmp_path / "apart"), rank=0, quiet=True)
    assert sum("is no fine-tune of the base given" in note for note in wrong["notes"]) == 2


def test_notes_name_a_longer_change_and_what_its_cosine_means(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"model.layers.0.mlp.up_proj.weight": torch.randn(40, 50, generator=generator) * 10}
    x, y = ({n: torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2))
    n = next(iter(base))
    cases: dict[str, tuple[Tensors, str]] = {
        "long": ({n: 3 * y[n]}, "times as long as that of m0"),
        "orthogonal": (y, "nearly orthogonal"),
        "alike": ({n: x[n] + 0.3 * y[n]}, "much alike"),
        "opposed": ({n: y[n] - x[n]}, "oppose one another"),
        "none": ({n: 0 * x[n]}, "is the base itself"),
    }
    for name, (other, words) in cases.items():
        paths = small(tmp_path / name, [x, other], base)
        notes = merge_report(paths[1:], model=paths[0], rank=0, quiet=True)["notes"]
        assert any(words in note for note in notes), (name, notes)
        assert any("long" in note and "times" in note for note in notes) == (name == "long")


# output


def test_the_directory_has_the_report_as_json_as_a_page_and_as_plots(models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    given = [str(models / "a"), str(models / "b"), "--model", str(models / "base"), "--data", str(models / "text.txt"), "--points", "3", "--rank", "2"]
    code, printed, _ = in_process([*given, "--out", str(tmp_path / "r"), "--json", "--quiet"], capsys, monkeypatch)
    assert code == 0
    assert json.loads(printed) == json.loads((tmp_path / "r" / "report.json").read_text())
    page = (tmp_path / "r" / "report.md").read_text()
    assert sorted(p.name for p in (tmp_path / "r" / "plots").iterdir()) == ["changes.png", "line.png", "pairs.png", "subspaces.png"]
    for plot in (tmp_path / "r" / "plots").iterdir():
        assert f"(plots/{plot.name})" in page and plot.read_bytes().startswith(b"\x89PNG")
    assert "by block" in page and "mlp.gate" in page and all(f"- {note}" in page for note in json.loads(printed)["notes"])
    code, printed, _ = in_process([*given[:4], "--rank", "0", "--quiet"], capsys, monkeypatch)
    assert code == 0 and "attention.q" in printed and "nearly orthogonal" in printed


def test_without_matplotlib_all_but_the_plots_is_written_and_it_is_said_once(models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    merge_report([str(models / "a"), str(models / "b")], rank=0, out=str(tmp_path / "r"))
    assert capsys.readouterr().err.count("pip install 'espalier[plot]'") == 1
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["report.json", "report.md"]


def test_many_pairs_are_drawn_and_listed_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(6, 5, generator=generator) for i in range(3)} | {"model.norm.weight": torch.ones(5)}
    changes = [{n: torch.randn(t.shape, generator=generator) * (i > 0) for n, t in base.items()} for i in range(5)]
    paths = small(tmp_path, changes, base)
    merge_report(paths[1:], model=paths[0], rank=2, out=str(tmp_path / "r"), quiet=True)
    assert "| m0 / m1 |" in (tmp_path / "r" / "report.md").read_text()
    assert merge_plots.is_there() and len(list((tmp_path / "r" / "plots").iterdir())) == 3


def test_names_are_short_and_tell_models_apart() -> None:
    assert names_of(["x/a", "x/b"]) == ["a", "b"]
    assert names_of(["x/a", "y/a", "y/b"]) == ["x/a", "y/a", "b"]
    assert names_of(["x/a", "x/a"]) == ["a (1)", "a (2)"]


def test_help_loads_no_torch() -> None:
    check = "import sys, espalier.cli.merge_report as m; m.command.get_help(__import__('click').Context(m.command)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


# bad input


def in_process(arguments: list[str], capsys: Any, monkeypatch: Any) -> tuple[int, str, str]:
    from espalier.cli.main import main

    monkeypatch.setattr(sys, "argv", ["espalier", "merge", "report", *arguments])
    code = 0
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def bad(models: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    a, b, base = (str(models / name) for name in ("a", "b", "base"))
    state, settings = tensors(models / "a"), ModelDirectory(models / "a").config
    save(tmp_path / "wide", {**state, "model.norm.weight": torch.randn(7)}, settings)
    save(tmp_path / "quantized", state, {**settings, "quantization_config": {"bits": 4}})
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = {**state, name: state[name].clone()}
    spoilt[name][3, 3] = float("nan")
    save(tmp_path / "nan", spoilt, settings)
    return {
        "one": ([a], "two models or more"),
        "nowhere": ([a, "./nowhere"], "nowhere does not exist"),
        "shape": ([a, str(tmp_path / "wide")], "model.norm.weight: it is (7,)"),
        "quantized": ([a, str(tmp_path / "quantized")], "is quantized"),
        "NaN": ([a, str(tmp_path / "nan")], f"{name}: {tmp_path / 'nan'} has nan"),
        "data": ([a, b, "--data", str(tmp_path / "none.txt")], "none.txt"),
        "density": ([a, b, "--model", base, "--density", "0"], "density is 0.0; it must be above 0"),
        "points": ([a, b, "--points", "1"], "points is 1"),
        "rank": ([a, b, "--rank", "-1"], "rank is -1"),
    }  # fmt: skip


@pytest.mark.parametrize("case", ["one", "nowhere", "shape", "quantized", "NaN", "data", "density", "points", "rank"])
def test_bad_input_ends_with_code_2_one_line_and_no_output(case: str, models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    arguments, message = bad(models, tmp_path)[case]
    code, _, printed = in_process([*arguments, "--out", str(tmp_path / "out"), "--quiet"], capsys, monkeypatch)
    assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert message in printed and not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_left_alone(models: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(EspalierError, match="already exists"):
        merge_report([str(models / "a"), str(models / "b")], out=str(tmp_path), quiet=True)


# memory

MEASURED = """
import sys, threading, time
from pathlib import Path
import espalier

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

def peak(base, *models):
    most, done = 0, False

    def watch():
        nonlocal most
        while not done:
            most = max(most, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    espalier.merge_report(list(models), model=base, rank=4, threads=2, quiet=True)
    done = True
    watcher.join()
    return most

espalier.merge_report(sys.argv[2:4], model=sys.argv[1], rank=4, quiet=True)  # imports are not what is measured
print(peak(*sys.argv[1:4]), peak(*sys.argv[4:7]))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two matrices of 512 columns in bf16; two models of them, and a base."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for rows, name in itertools.product((1_000, 16_000), ("base", "a", "b")):
        content = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(rows, 512, generator=generator).bfloat16() for i in range(2)}
        paths.append(str(save(tmp_path / f"{name}{rows}", content)))
    done = subprocess.run([sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert second < first + 45_000, f"{first} KiB, and {second} KiB for models that are larger by 31 MB each"


