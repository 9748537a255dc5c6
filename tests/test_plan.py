"""``espalier plan``: bytes by phase and kind before anything is loaded; what cannot go together is refused there, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import nn

import espalier
from espalier import registry
from espalier.attach import load
from espalier.checkpoint.directory import resolve_model
from espalier.errors import EspalierError
from espalier.memory import rule as rule_module
from espalier.memory import subspace, zeroth_order
from espalier.plan.memory import KINDS, PHASES
from espalier.plan.trace import _Ledger

SMALL: dict[str, Any] = {"batch_size": 2, "sequence_length": 64, "quiet": True, "device": "cpu"}
MEBI = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder)
    return str(folder)


Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(model: str) -> Plan:
    return lambda **options: espalier.plan(model, **{**SMALL, **options})


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A plan that read weights would fail."""
    if request.node.name != "test_tune_plans_what_plan_says_and_measures_it":
        monkeypatch.setattr(load, "load_as", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("def f(x):\n    return x\n" * 80)
    return path


def test_every_phase_has_every_kind_and_the_peak_is_their_largest_sum(plan: Plan) -> None:
    found = plan(method="full")
    assert list(found["phases"]) == list(PHASES[1:]), "nothing looks at the data"
    assert all(tuple(kinds) == KINDS for kinds in found["phases"].values())
    assert found["predicted_peak"] == max(found["peaks"].values()) == found["peaks"][found["worst"]]
    assert found["least"] <= found["needs"] and found["predicted_peak"] < found["needs"]


def test_full_training_has_what_the_formulas_of_its_parts_say(plan: Plan) -> None:
    found = plan(method="full")
    steady, first, end = (found["phases"][phase] for phase in ("steady state", "first step", "export"))
    assert steady["trained"] == 4 * found["trained"] and steady["optimizer"] == 8 * found["trained"]
    assert first["optimizer"] == 0 or first["activations"] == 0, "forward and backward of the first step have no state beside them"
    assert found["phases"]["checkpoint"]["gradients"] == 0
    assert end["buffers"] == 0 and plan(method="full", dtype="bf16")["phases"]["export"]["buffers"] == 2 * found["trained"], "rounded to the base's dtype"


def test_tune_plans_what_plan_says_and_measures_it(model: str, text: Path, tmp_path: Path) -> None:
    options = {**SMALL, "method": "lisa", "optimizer": "frugal", "rank": 64, "state": "8bit", "steps": 2}
    said = espalier.plan(model, **options)
    done = espalier.tune(model, str(text), str(tmp_path / "out"), **options)
    for phase, kinds in said["phases"].items():
        there = done["plan"]["phases"][phase]
        assert {k: v for k, v in kinds.items() if k != "libraries"} == {k: v for k, v in there.items() if k != "libraries"}, phase
    assert done["import_baseline"] == done["plan"]["baseline"] < done["predicted_peak"]
    assert json.loads((tmp_path / "out" / "run" / "result.json").read_text())["plan"] == done["plan"]


def test_of_several_micro_batches_all_gradients_are_there_beside_the_activations(plan: Plan) -> None:
    """Of one, the last layer's activations are gone before the first layer's gradient comes."""
    one, several = (plan(method="full", batch_size=2, micro_batch_size=m, recompute=False, logits_chunk=64)["phases"]["steady state"] for m in (2, 1))
    assert (several["activations"] and several["gradients"] >= 4 * plan(method="full")["trained"]) or several["activations"] == 0
    assert one["gradients"] <= several["gradients"]


@pytest.mark.parametrize("options", [{"optimizer": "galore", "choice": "random", "rank": 4}, {"optimizer": "frugal", "rest_rule": "none", "split": "blocks"}], ids=str)
def test_sums_of_gradients_between_micro_batches_are_there_while_parameters_are_moved_during_the_backward_pass(plan: Plan, model: str, options: dict[str, Any]) -> None:
    one, several = (plan(method="full", targets="all", update_in_backward=True, micro_batch_size=m, **options)["phases"]["steady state"] for m in (2, 1))
    parameters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in tiny("llama", vocab_size=4096).named_parameters()}
    optimizer = registry.make(options.pop("optimizer"), "optimizer", **options)
    built, held = optimizer.build(parameters, 0.01), 0
    for p in parameters.values():
        p.grad = torch.ones_like(p)
        held += 0 if built.hold(p) else p.nbytes
    held += sum(t.nbytes for t in built._held.values())
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    assert optimizer.summed_bytes(shapes) == pytest.approx(held, rel=0.1) and held <= optimizer.summed_bytes(shapes)
    assert several["gradients"] >= held and several["gradients"] - one["gradients"] > 0.9 * held


def test_lisa_has_gradients_and_state_of_what_moves_at_a_time(plan: Plan, model: str) -> None:
    lisa = plan(method="lisa", layers=1, targets="attention,mlp")
    full = plan(method="full", targets="attention,mlp")
    blocks = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    assert lisa["trained"] == full["trained"]
    assert lisa["phases"]["checkpoint"]["optimizer"] * blocks == full["phases"]["checkpoint"]["optimizer"]
    assert lisa["phases"]["steady state"]["activations"] <= full["phases"]["steady state"]["activations"]


def test_a_budget_chooses_and_one_that_is_too_small_is_refused_as_tune_refuses_it(plan: Plan) -> None:
    free = plan(batch_size=64)
    tight = plan(batch_size=64, budget=f"{(free['needs'] + free['least']) // 2}B")
    assert tight["needs"] <= tight["budget"] and (tight["recompute"] or tight["micro_tokens"] < free["micro_tokens"])
    with pytest.raises(EspalierError, match=r"--budget 64\.0 MiB is too small: the least that would do is"):
        plan(budget="64MiB")


def test_an_architecture_is_planned_without_a_tokenizer_or_a_model(tmp_path: Path) -> None:
    config = json.loads((resolve_model("seedling") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}))
    found = espalier.plan(architecture=str(tmp_path / "config.json"), **SMALL)
    assert found["method"] == "full" and found["dtype"] == "bf16" and found["phases"]["steady state"]["weights"] < 1024
    assert espalier.plan(architecture=str(tmp_path / "config.json"), sequence_length=64, quiet=True, device="cpu")["batch_tokens"] == 16 * 64, "as pretrain's"
    with pytest.raises(EspalierError, match="give --tokenizer DIR"):
        espalier.plan(architecture=str(tmp_path / "config.json"), add_tokens="a,b", **SMALL)


@pytest.mark.parametrize("density", [0.02, 0.1])
@pytest.mark.parametrize("method", ["spiel", "masked", "sara"])
def test_single_entries_are_planned_however_their_places_will_be_stored(plan: Plan, method: str, density: float) -> None:
    """As numbers where they are few, as a bitmap where they are many, which is made of the numbers themselves."""
    found = plan(method=method, density=density)
    assert 4 * found["trained"] <= found["phases"]["export"]["buffers"] + found["phases"]["export"]["trained"]


def test_a_method_that_looks_at_the_data_is_planned_as_if_nothing_had_been_looked_at(plan: Plan) -> None:
    found = plan(method="eva")
    assert found["phases"]["data"]["buffers"] > 0 and found["phases"]["data"]["weights"] == 0


SHAPES = {"layers.0.q.weight": (256, 384), "layers.0.k.weight": (512, 256), "layers.1.q.weight": (768, 256), "norm": (256,), "embed": (1500, 256)}


def optimizers() -> list[Any]:
    return [info for info in registry.methods() if info.role == "optimizer"]


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("info", optimizers(), ids=lambda info: info.name)
def test_what_an_optimizers_step_holds_for_a_moment_is_what_it_says(info: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors and slices a sixteenth as large as they are."""
    bucket = rule_module.BUCKET >> 4
    for module in (rule_module, subspace):
        monkeypatch.setattr(module, "BUCKET", bucket)
    monkeypatch.setattr(zeroth_order, "SLICE", bucket)
    if info.name in ("adafactor", "muon") and state != "fp32":
        pytest.skip("its state is fp32")
    projected = {"every": 1, "staggered": False, "choice": "randomized", "rank": 16} if "choice" in {h.name for h in info.hyperparameters} else {}
    rule = registry.make(info.name, "optimizer", **projected)
    rule.state = state
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    optimizer = rule.build(parameters, 1e-3)
    measured = 0
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter) * torch.linspace(-1, 1, parameter.shape[-1])
        there = [t for one in optimizer.state.values() for t in one.values() if isinstance(t, torch.Tensor)]
        with _Ledger([*parameters.values(), *(p.grad for p in parameters.values() if p.grad is not None), *there]) as ledger:
            optimizer.step(lambda: torch.zeros(()))
        measured = ledger.worst((), False).total  # of the second step, which makes no state
    said = rule.step_bytes(SHAPES)
    assert measured <= 1.15 * said + MEBI / 16 and said <= 1.8 * measured + MEBI / 16, f"{measured / MEBI:.1f} MiB measured, {said / MEBI:.1f} said"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "galore"}, "rank 128.* would be adamw; take a lower rank"),
    ({"optimizer": "muon", "method": "bitfit", "targets": "norm"}, "muon is for the matrices of a model's blocks, and none trains"),
    ({"optimizer": "fira", "method": "bitfit", "targets": "norm"}, "fira is for the matrices of a model's blocks, and none trains"),
    ({"optimizer": "galore", "method": "full", "targets": "embedding"}, "galore is for the matrices of a model's blocks"),
    ({"optimizer": "galore", "method": "full", "scale": -1}, "scale is -1.0; it must be more than 0"),
    ({"optimizer": "galore", "method": "full", "scale": 0}, "scale is 0.0; it must be more than 0"),
    ({"optimizer": "galore", "rank": 4}, "--rank is an option of lora and of galore; give --method-rank for lora or --optimizer-rank for galore"),
    ({"optimizer": "frugal", "method": "lisa", "every": 4}, "give --method-every for lisa or --optimizer-every for frugal"),
    ({"optimizer": "frugal", "method": "full", "split": "blocks", "rank": 4}, "--split blocks takes --density"),
    ({"optimizer": "frugal", "method": "lisa", "split": "blocks"}, "lisa moves only some at a time; give another --split"),
    ({"optimizer": "muon", "state": "8bit", "method": "full"}, "muon, which is torch's, keeps its state in fp32"),
    ({"state": "8bit", "rank": 1}, "--state 8bit is for tensors of 4,096 numbers or more; the largest that trains has"),
    ({"state": "bf16", "method": "bitfit", "targets": "norm"}, "take --state fp32"),
    ({"base_bits": 8, "method": "full"}, "--base-bits keeps frozen weights as codes, and full trains all"),
    ({"base_bits": 4, "method": "lisa"}, "and lisa trains all"),
    ({"base_bits": 4, "method": "perp"}, "as codes, which do not keep its zeros, and perp goes by these"),
    ({"base_bits": 8, "method": "ist", "inner": "perp"}, "do not keep its zeros, and ist goes by these"),
    ({"base_bits": 5}, "base_bits is 5; it must be one of: 4, 8"),
    ({"method": "hft", "share": 0, "targets": "attention"}, "hft with these options trains nothing"),
    ({"method": "increlora", "steps": 1, "rank": 8}, "the run is too short for an average rank of 8"),
    ({"method": "dora", "dropout": 0.5}, "dropout 0.5 does not go with dora"),
    ({"method": "lora", "targets": "norm"}, "lora takes matrices"),
    ({"device": "meta"}, "--device is 'meta'"),
    ({"trainable": "10k", "method": "full"}, "full has no hyperparameter that sets how many numbers train"),
    ({"optimizer": "perpgrad", "rule": "galore", "method": "full"}, "rule is galore; it must be an optimizer that treats all numbers alike"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, Mapping) else "")
def test_what_cannot_go_together_is_refused_before_a_model_is_loaded(plan: Plan, model: str, options: dict[str, Any], words: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=words):
        plan(**options)
    with pytest.raises(EspalierError, match=words):
        espalier.tune(model, str(text), str(tmp_path / "out"), **{**SMALL, "steps": 2, **options})
    assert not (tmp_path / "out").exists()


def test_a_qualified_option_is_that_parts_own_and_a_recipe_keeps_it(plan: Plan) -> None:
    found = plan(method="lora", method_rank=8, optimizer="galore", optimizer_rank=4)
    assert found["trained"] == plan(method="lora", rank=8)["trained"]
    assert found["phases"]["checkpoint"]["optimizer"] < plan(method="lora", rank=8)["phases"]["checkpoint"]["optimizer"]
    assert plan(method="lora", method_rank=8)["trained"] == found["trained"], "also where only one has it"
    with pytest.raises(EspalierError, match="rnk is no option of lora"):
        plan(rnk=3)
    with pytest.raises(EspalierError, match="optimizer_rank is no option of lora"):
        plan(optimizer_rank=3)
    with pytest.raises(EspalierError, match="give --rank or --method-rank, which mean the same here, not both"):
        plan(rank=3, method_rank=4)


def test_ranks_of_frugal_stand_for_a_density() -> None:
    by_rank, by_density = (registry.make("frugal", "optimizer", **options).state_bytes({"layers.0.w": (64, 128)}) for options in ({"rank": 32}, {"density": 0.25}))
    assert by_rank == by_density


def test_a_parameter_that_is_not_contiguous_is_refused_when_the_optimizer_is_made() -> None:
    parameter = nn.Parameter(torch.zeros(4, 8).T)
    with pytest.raises(EspalierError, match=r"the parameter layers\.0\.w is not contiguous"):
        registry.make("lion", "optimizer").build({"layers.0.w": parameter}, 1e-3)
