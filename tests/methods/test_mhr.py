"""MHR and Polytropon: a bank of skills, mixed for each task."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, tiny, tokens

import espalier
from espalier import convert, registry, tune
from espalier.attach.attachment import Attachment, attach, attachments, trainable_parameters
from espalier.attach.course import Course
from espalier.attach.load import load
from espalier.attach.tasks import choose_task
from espalier.budget.fitting import fit, trained
from espalier.delta import store
from espalier.delta.forms import Bank
from espalier.errors import EspalierError
from espalier.exchange.save import save

SMALL = {"rank": 2, "alpha": 3.0, "skills": 3, "heads": 4}


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return copy.deepcopy(tiny("llama"))


@pytest.fixture(scope="module")
def folder(base: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a bank of the tasks a, b and c."""
    folder = tmp_path_factory.mktemp("bank")
    base.save_pretrained(folder / "base")
    model, _ = mhr(base, tasks="a,b,c")
    shake(model)
    save(model, folder / "bank", base=folder / "base")
    return folder


def mhr(base: torch.nn.Module, **options: Any) -> tuple[torch.nn.Module, Attachment]:
    model = attach(copy.deepcopy(base), "mhr", name="d", **({} if "bank" in options else SMALL) | options)
    return model, attachments(model)["d"]


def shake(model: torch.nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_one_head_and_one_skill_are_lora(base: torch.nn.Module) -> None:
    """"Q=1,S=1 equals LoRA": from the same start, through steps of training."""
    model, _ = mhr(base, heads=1, skills=1)
    lora = attach(copy.deepcopy(base), "lora", rank=2, alpha=3.0)
    x = tokens()
    for _ in range(3):
        for one in (model, lora):
            one.zero_grad()
            one(x, labels=x).loss.backward()
            with torch.no_grad():
                for name, parameter in trainable_parameters(one).items():
                    if not name.endswith(".Z"):
                        parameter -= 0.5 * parameter.grad
                    else:
                        assert parameter.grad.abs().max() < 1e-6, "the share of a single skill is 1, whatever its logit"
    torch.testing.assert_close(logits(model), logits(lora), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)


def test_a_constant_routing_is_the_mean_skill(base: torch.nn.Module) -> None:
    """"with Z_t constant the result equals the mean skill": of factors mixed apart, not of the skills' updates."""
    model, attached = mhr(base)
    shake(model)
    with torch.no_grad():
        attached.pool.Z.fill_(0.7)
    bank = next(iter(attached.updates().values()))
    weight = torch.zeros(bank.shape)
    B, A = bank.B.mean(1), bank.A.mean(1)  # (heads, out / heads, rank), (heads, rank, in / heads)
    mean = 1.5 * torch.cat(list(B)) @ torch.cat(list(A), -1)
    same(bank.of(0).materialize(weight), mean)
    same(bank.mean().materialize(weight), mean)
    updates = sum(1.5 * torch.cat(list(bank.B[:, s])) @ torch.cat(list(bank.A[:, s]), -1) for s in range(3)) / 3
    assert not torch.allclose(updates, mean, atol=0.01)


def test_the_delta_is_zero_at_the_start(base: torch.nn.Module) -> None:
    """"Delta zero at init", though A and the routing are not; the blocks of A start as LoRA's of their own inputs."""
    model, attached = mhr(base, tasks="a,b")
    for task in "ab":
        choose_task(model, task)
        assert torch.equal(logits(model), logits(base))
    assert 0 < attached.pool.Z.abs().max() <= 1e-3
    slot = next(iter(attached.slots.values()))
    bound = (slot.target.inputs / 4) ** -0.5
    assert 0.9 * bound < slot.A.abs().max() <= bound


@pytest.mark.parametrize("routing", ["layer", "model"])
def test_the_delta_of_a_task_does_what_the_routed_forward_does(routing: str, base: torch.nn.Module, tmp_path: Path) -> None:
    """"materialised Delta^t applied as a dense delta equals the routed forward for that task"."""
    base.save_pretrained(tmp_path / "base")
    model, _ = mhr(base, tasks="a,b,c", routing=routing)
    shake(model, 0.5)
    save(model, tmp_path / "bank", base=tmp_path / "base")
    outputs = {}
    for task in "abc":
        choose_task(model, task)
        outputs[task] = logits(model)
    choose_task(model, "a")
    assert torch.equal(logits(model), outputs["a"]), "the choice can be made again"
    assert not torch.allclose(outputs["a"], outputs["c"], atol=1e-2)
    for task in "ac":
        convert(str(tmp_path / "bank"), str(tmp_path / task), task=task, quiet=True)
        delta = store.load(tmp_path / task)
        assert {update.form for update in delta.updates.values()} == {"low_rank"} and "tasks" not in delta.manifest
        same(logits(load(tmp_path / "base", [tmp_path / task])), outputs[task])
    espalier.apply(str(tmp_path / "base"), [str(tmp_path / "c")], str(tmp_path / "merged"), quiet=True)
    same(logits(load(tmp_path / "merged")), outputs["c"])


def test_what_is_kept_of_a_weight_in_evaluation_is_of_the_task(base: torch.nn.Module) -> None:
    model, _ = mhr(base, tasks="a,b")
    shake(model)
    owner, found = model.get_submodule("model.layers.0.self_attn.q_proj"), {}
    for task in "aba":
        choose_task(model, task)
        logits(model)
        with torch.no_grad():
            now = owner._updated("weight").clone()
        assert torch.equal(found.setdefault(task, now), now)
    assert not torch.equal(found["a"], found["b"])


def test_rows_of_a_batch_have_tasks_of_their_own_through_the_deltas_of_the_tasks(folder: Path, tmp_path: Path) -> None:
    model = load(folder / "base")
    alone = {}
    for task in "ab":
        convert(str(folder / "bank"), str(tmp_path / task), task=task, quiet=True)
        alone[task] = logits(load(folder / "base", [tmp_path / task]))
    from espalier.attach.load import put_on
    from espalier.checkpoint.directory import ModelDirectory

    for task in "ab":
        put_on(model, tmp_path / task, ModelDirectory(folder / "base"))
    x = tokens()
    with espalier.rows(model, ["delta1"] + ["delta0"] * (len(x) - 1)):
        mixed = logits(model)
    same(mixed[0], alone["b"][0])
    same(mixed[1:], alone["a"][1:])


def test_the_counts_are_those_of_the_variants(base: torch.nn.Module, folder: Path) -> None:
    """"MHR-z trainable count == layers*Q*S"; MHR-mu trains one LoRA of the same rank, however many skills there were."""
    layers = 7 * LAYERS
    model, attached = mhr(base, bank=str(folder / "bank"), variant="routing")
    assert attached.trainable() == layers * 4 * 3 == trained(attached.method, attached.targets)
    assert set(trainable_parameters(model)) == {"espalier_pools.d.Z"}
    _, attached = mhr(base, bank=str(folder / "bank"), variant="mean")
    lora = attach(copy.deepcopy(base), "lora", rank=2)
    assert attached.trainable() == attachments(lora)["lora"].trainable() == trained(attached.method, attached.targets)
    _, attached = mhr(base, bank=str(folder / "bank"), tasks="x,y", routing="model")
    assert attached.trainable() == 3 * attachments(lora)["lora"].trainable() + 2 * 4 * 3


def test_the_variants_of_a_bank_start_at_its_mean(base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    """"new routing row re-initialised to U(-1e-3,1e-3) (i.e. the average)"; MHR-mu is a plain LoRA to others."""
    mean, attached = mhr(base, bank=str(folder / "bank"), variant="mean")
    assert {update.form for update in attached.updates().values()} == {"low_rank"}
    assert not torch.allclose(logits(mean), logits(base), atol=1e-2)
    given = store.load(folder / "bank", bank=True)
    for name, update in attached.updates().items():
        bank = given.updates[name]
        same(update.materialize(torch.zeros(bank.shape)), bank.mean().materialize(torch.zeros(bank.shape)))
    for variant in ("routing", "all"):
        model, attached = mhr(base, bank=str(folder / "bank"), variant=variant)
        torch.testing.assert_close(logits(model), logits(mean), rtol=1e-2, atol=1e-2)
        for name, update in attached.updates().items():
            assert torch.equal(update.B, given.updates[name].B) and update.gain == given.updates[name].gain
    assert save(mean, tmp_path / "mean", base=folder / "base")["peft"] is None


def test_the_routing_learns_at_a_rate_of_its_own(base: torch.nn.Module) -> None:
    """"router LR must be about 100x the adapters'"."""
    model, _ = mhr(base)
    options = Course(model, 3).optimizer_options()
    assert options == {"espalier_pools.d.Z": {"rate": 100.0}}


def test_a_batch_of_no_task_is_refused_where_there_are_several(base: torch.nn.Module) -> None:
    model, _ = mhr(base, tasks="a,b")
    with pytest.raises(EspalierError, match=r"one of the tasks a, b; say which with choose_task"):
        model(tokens())
    with pytest.raises(EspalierError, match=r"'d' has no task 'z'; it has: a, b"):
        choose_task(model, "z")
    with pytest.raises(EspalierError, match="no delta on the model has tasks"):
        choose_task(copy.deepcopy(base), "a")


def test_spaces_around_the_names_of_tasks_mean_nothing() -> None:
    assert registry.make("mhr", "adapter", tasks="a, b c ,, d").task_names() == ["a", "b c", "d"]


def test_a_bank_is_used_by_its_tasks_and_says_so(folder: Path, tmp_path: Path) -> None:
    bank = str(folder / "bank")
    for use in (
        lambda: espalier.apply(str(folder / "base"), [bank], str(tmp_path / "x"), quiet=True),
        lambda: load(folder / "base", [bank]),
        lambda: convert(bank, str(tmp_path / "x"), to="dense", quiet=True),
        lambda: espalier.merge([bank, bank], str(tmp_path / "x"), method="linear", model=str(folder / "base"), quiet=True),
    ):
        with pytest.raises(EspalierError, match=r"bank of 3 tasks \(a, b, c\).*convert .*bank --task a --out DIR"):
            use()
    with pytest.raises(EspalierError, match="has no task 'z'; its tasks are: a, b, c"):
        convert(bank, str(tmp_path / "x"), task="z", quiet=True)
    assert espalier.info(bank)["tasks"] == ["a", "b", "c"]
    assert "espalier convert . --task a --out TASK" in (folder / "bank" / "README.md").read_text()
    update = next(iter(store.load(folder / "bank", bank=True).updates.values()))
    with pytest.raises(EspalierError, match="a bank of 3 tasks"):
        update.materialize(torch.zeros(update.shape))


def test_a_task_of_several_words_is_named_as_a_shell_reads_it(base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    model, _ = mhr(base, tasks="natural language inference,b")
    save(model, tmp_path / "bank", base=folder / "base")
    with pytest.raises(EspalierError, match="--task 'natural language inference' --out DIR"):
        store.load(tmp_path / "bank")
    assert "convert . --task 'natural language inference' --out TASK" in (tmp_path / "bank" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"heads": 5}, r"heads is 5, which does not divide model\.layers\.0\.self_attn\.q_proj\.weight of 32 x 32"),
        ({"skills": 0}, "skills is 0; it must be at least 1"),
        ({"ratio": -1.0}, "ratio is -1.0"),
        ({"variant": "mean"}, "variant is 'mean', which is of a trained bank; say which with bank"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], complaint: str, base: torch.nn.Module) -> None:
    with pytest.raises(EspalierError, match=complaint):
        mhr(base, **options)


def test_a_bank_of_another_kind_or_model_is_refused(base: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    lora = attach(copy.deepcopy(base), "lora", rank=2)
    save(lora, tmp_path / "lora", base=folder / "base")
    with pytest.raises(EspalierError, match="a delta of lora; it must be one of mhr"):
        mhr(base, bank=str(tmp_path / "lora"))
    with pytest.raises(EspalierError, match=r"has skills of shapes .* for model.layers.0.self_attn.q_proj.weight; it must have"):
        mhr(tiny("llama", hidden_size=64), bank=str(folder / "bank"))


def test_how_much_trains_over_a_bank_is_the_banks(base: torch.nn.Module, folder: Path) -> None:
    _, attached = mhr(base, bank=str(folder / "bank"))
    with pytest.raises(EspalierError, match="mhr has no hyperparameter that sets how many numbers train"):
        fit(attached.method, attached.targets, 100_000)


def write(path: Path, tasks: tuple[str, ...], records: int = 6) -> str:
    lines = [json.dumps({"text": f"{task} {'alpha' if task < 'm' else 'omega'} {n} " * 4, "task": task}) for n in range(records) for task in tasks]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_tune_learns_the_tasks_of_its_data_and_a_new_one_over_their_bank(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ("early", "late", "zero"))
    fixed = {"micro_batch_size": 4, "recompute": False, "logits_chunk": 64}  # there is nothing to plan
    few: dict[str, Any] = {"batch_size": 4, "sequence_length": 32, "quiet": True, "targets": "attention.q,attention.v", **fixed}
    result = tune("seedling", data, str(tmp_path / "bank"), method="mhr", steps=4, eval_data=[data], rank=1, skills=2, heads=2, **few)
    assert result["evaluation"][data]["after"]["loss"] < result["evaluation"][data]["before"]["loss"]
    manifest = store.manifest_of(tmp_path / "bank")
    assert manifest["tasks"] == ["early", "late", "zero"] and manifest["hyperparameters"]["tasks"] == "early,late,zero"
    bank = store.load(tmp_path / "bank", bank=True)
    update = next(iter(bank.updates.values()))
    assert isinstance(update, Bank) and update.tasks == 3
    assert update.Z.abs().max() > 1e-2, "the routing moved"
    new = write(tmp_path / "new.jsonl", ("new",), 6)
    result = tune("seedling", new, str(tmp_path / "z"), method="mhr", bank=str(tmp_path / "bank"), variant="routing", steps=2, **few)
    assert result["trained"] == len(bank.updates) * 2 * 2
    after = store.load(tmp_path / "z")
    assert after.manifest["tasks"] == ["new"]
    assert all(torch.equal(after.updates[name].B, one.B) for name, one in bank.updates.items()), "the skills stay"


def test_data_of_other_tasks_or_of_some_are_refused(tmp_path: Path) -> None:
    data, other = write(tmp_path / "data.jsonl", ("a", "b")), write(tmp_path / "other.jsonl", ("c",))
    common: dict[str, Any] = {"method": "mhr", "steps": 1, "sequence_length": 32, "quiet": True}
    with pytest.raises(EspalierError, match=r"other\.jsonl has the task 'c'; known are: a, b"):
        tune("seedling", data, str(tmp_path / "x"), eval_data=[other], **common)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "no task here"}) + "\n")
    with pytest.raises(EspalierError, match=r"plain.jsonl name no task; they must be of a, b"):
        tune("seedling", data, str(tmp_path / "x"), eval_data=[str(plain)], **common)
    plain.write_text(plain.read_text() + json.dumps({"text": "a task here", "task": "a"}) + "\n")
    with pytest.raises(EspalierError, match="1 of 2 records name no task"):
        tune("seedling", str(plain), str(tmp_path / "x"), **common)
    plain.write_text(json.dumps({"text": "a task here", "task": "a,b"}) + "\n")
    with pytest.raises(EspalierError, match="a task 'a,b'; the name of a task must have no comma"):
        tune("seedling", str(plain), str(tmp_path / "x"), **common)
