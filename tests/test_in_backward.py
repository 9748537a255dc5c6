"""Parameters that are moved during the backward pass: the same bits as after it, and few gradients alive."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FUNCTIONS, config, save_model, tiny, tokens

from espalier import registry
from espalier.attach.attachment import attach, trainable_parameters
from espalier.checkpoint.safetensors_file import read_safetensors
from espalier.errors import EspalierError, NotFiniteError
from espalier.memory import in_backward
from espalier.memory.in_backward import InBackward
from espalier.plan.trace import trace_step
from espalier.train import checkpoint, steps
from espalier.verbs.pretrain import pretrain
from espalier.verbs.tune import tune


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters of tiny models would all wait for each other."""
    monkeypatch.setattr(in_backward, "WAITING", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("backward") / "model")
    (folder.parent / "text.txt").write_text(FUNCTIONS)
    return folder


def run(model: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    settings = {"steps": 4, "batch_size": 2, "sequence_length": 32, "learning_rate": 0.01, "clip": 0, "quiet": True}
    tune(str(model), str(model.parent / "text.txt"), str(out), **{**settings, **options})
    return read_safetensors(out / "delta.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


FULL: dict[str, Any] = {"method": "full"}


@pytest.mark.parametrize(
    "options",
    [
        FULL,
        {**FULL, "optimizer": "lion", "state": "8bit", "weight_decay": 0.1},
        {**FULL, "optimizer": "gradnorm-lorp", "rank": 4, "every": 2, "dtype": "bf16", "state": "bf16"},
        {**FULL, "optimizer": "muon"},
        {**FULL, "optimizer": "perpgrad", "recompute": True},
        {"method": "lisa", "layers": 1, "every": 2},
        {"method": "lora", "ratio": 4.0, "dropout": 0.2},
        {"method": "lamda"},
        {"method": "sora"},
        {"method": "dora", "targets": "attention", "full": "embedding,norm"},
    ],
    ids=str,
)
def test_it_does_what_a_step_after_the_backward_pass_does_to_the_bit(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    one, two = (run(model, tmp_path / str(during), update_in_backward=during, micro_batch_size=2, **options) for during in (False, True))
    assert same(one, two)
    for before, now in zip(records(tmp_path / "False"), records(tmp_path / "True"), strict=True):
        assert before["loss"] == now["loss"] and now["gradient_norm"] == pytest.approx(before["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_tied_embeddings_and_experts_are_moved_once_with_all_of_their_gradient(family: str) -> None:
    usual, during = (attach(tiny(family), "full", targets="all") for _ in range(2))
    moved: list[str] = []
    names = {id(p): n for n, p in trainable_parameters(during).items()}
    optimizers = [registry.make("lion", "optimizer").build(trainable_parameters(m), 0.01) for m in (usual, during)]

    def move(some: list[torch.nn.Parameter]) -> None:
        moved.extend(names[id(p)] for p in some)
        optimizers[1].step()

    with InBackward(trainable_parameters(during), move) as mover:
        for step in range(3):
            x = tokens(seed=step)
            usual(x, labels=x).loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
            during(x, labels=x).loss.backward()
            mover.finish()
            assert sorted(moved) == sorted(names.values())
            moved.clear()
    assert same({n: p.detach() for n, p in trainable_parameters(usual).items()}, {n: p.detach() for n, p in trainable_parameters(during).items()})


def test_one_gradient_is_alive_at_a_time() -> None:
    model = attach(tiny("llama", num_hidden_layers=4), "full", targets="all")
    parameters, alive = trainable_parameters(model), []

    def move(some: list[torch.nn.Parameter]) -> None:
        alive.append(sum(p.grad is not None for p in parameters.values()))

    with InBackward(parameters, move):
        x = tokens()
        model(x, labels=x).loss.backward()
    assert len(alive) == len(parameters) and max(alive) == 1 and all(p.grad is None for p in parameters.values())
    model(x, labels=x).loss.backward()  # the hooks are gone
    assert len(alive) == len(parameters) and all(p.grad is not None for p in parameters.values())


def test_small_parameters_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny("llama"), "full", targets="all")
    parameters, sizes = trainable_parameters(model), []
    monkeypatch.setattr(in_backward, "WAITING", 1000)
    with InBackward(parameters, lambda some: sizes.append(sum(p.numel() for p in some))) as mover:
        x = tokens()
        model(x, labels=x).loss.backward()
        mover.finish()
    assert all(size >= 1000 for size in sizes[:-1]) and sum(sizes) == sum(p.numel() for p in parameters.values()) and len(sizes) < len(parameters)


def test_the_plan_counts_the_gradients_that_are_there() -> None:
    """Deep models: of all gradients, one is left."""
    options: dict[str, Any] = {"dtype": torch.float32, "tokens": 64, "sequence_length": 64, "recompute": True, "chunk": 64}
    method = registry.make("full", "adapter")
    usual, few = (trace_step(config("llama", num_hidden_layers=12), method, {"targets": "all"}, gradients=g, **options) for g in ("all", "few"))
    assert usual.shapes == few.shapes and few.peak < usual.peak - 0.5 * 4 * usual.trained


# of several micro-batches


SMALL: list[dict[str, Any]] = [
    {"optimizer": "frugal", "rest_rule": "none", "every": 2},
    {"optimizer": "frugal", "rest_rule": "none", "split": "blocks", "every": 2},
    {"optimizer": "galore", "choice": "random", "rank": 4, "every": 2},
    {"optimizer": "natural-galore", "choice": "random", "rank": 4, "every": 3},
]


@pytest.mark.parametrize("options", SMALL, ids=lambda options: f"{options['optimizer']} {options.get('split', '')}")
def test_gradients_of_micro_batches_add_up_in_a_small_form(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """To the bit where what is kept are some of the numbers; through a projector, up to the order of sums."""
    given = {**FULL, "steps": 4, "micro_batch_size": 1, "learning_rate": 1e-3, **options}
    one, two = (run(model, tmp_path / str(during), update_in_backward=during, **given) for during in (False, True))
    if options["optimizer"] == "frugal":
        assert same(one, two)
    assert all(torch.allclose(one[n], two[n], atol=2e-5) for n in one)


@pytest.mark.parametrize("options", SMALL[:3:2], ids=lambda options: options["optimizer"])
def test_what_is_held_between_micro_batches_is_small(options: dict[str, Any]) -> None:
    model = attach(tiny("llama"), "full", targets="attention,mlp")
    parameters = trainable_parameters(model)
    rule = registry.make(options["optimizer"], "optimizer", **{k: v for k, v in options.items() if k != "optimizer"})
    optimizer = rule.build(parameters, 0.01)
    x = tokens()
    with InBackward(parameters, lambda some: optimizer.step() and None, optimizer.hold) as mover:
        for last in (False, False, True):
            mover.is_last = last
            model(x, labels=x).loss.backward()
            held = sum(t.numel() for t in optimizer._held.values())
            assert all(p.grad is None for p in parameters.values())
            assert held == 0 if last else 0 < held < 0.5 * sum(p.numel() for p in parameters.values())


def test_gradients_that_only_some_micro_batches_give_are_not_lost() -> None:
    """Experts, or tasks: the last backward pass does not reach every parameter."""
    for name in ("lion", "frugal"):
        moved: dict[bool, list[torch.Tensor]] = {}
        for during in (False, True):
            parts = {f"model.layers.{i}.mlp.up_proj.weight": torch.nn.Parameter(torch.ones(8, 8)) for i in range(2)}
            optimizer = registry.make(name, "optimizer", **({"rest_rule": "none"} if name == "frugal" else {})).build(parts, 0.1)
            one, two = parts.values()
            losses = [lambda one=one: (one**2).sum(), lambda two=two: (two**3).sum()]
            if during:
                with InBackward(parts, lambda some, optimizer=optimizer: optimizer.step() and None, optimizer.hold) as mover:
                    for number, loss in enumerate(losses):
                        mover.is_last = number == 1
                        loss().backward()
                    mover.finish()
            else:
                for loss in losses:
                    loss().backward()
                optimizer.step()
            moved[during] = [one.detach(), two.detach()]
        assert all(torch.equal(a, b) and bool((a != 1).any()) for a, b in zip(moved[False], moved[True], strict=True))


# what is refused, and what goes wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 1.0}, "their norm cannot be clipped .clip is 1.; give --clip 0"),
        ({"method": "adalora"}, "--update-in-backward does not go with adalora, which looks at the gradients of a whole step"),
        ({"method": "allora"}, "allora, which looks at the gradients"),
        ({"method": "increlora"}, "increlora, which looks at the gradients"),
        ({"method": "full", "micro_batch_size": 1}, "micro_batch_size, which is 1, must be that of the batch, 2; or take galore --choice random"),
        ({"method": "full", "micro_batch_size": 1, "optimizer": "galore"}, "--optimizer galore needs whole gradients"),
        ({"method": "full", "micro_batch_size": 1, "optimizer": "fira", "choice": "random"}, "--optimizer fira needs whole gradients"),
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused_before_anything_is_loaded(options: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=words):
        run(model, tmp_path / "out", update_in_backward=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_moves_nothing_itself_and_reaches_no_checkpoint(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before it has moved; it says so."""
    true, seen = steps.DuringBackward._measure, []
    before: dict[str, torch.Tensor] = {}

    def broken(self: Any, some: list[torch.nn.Parameter]) -> None:
        seen.append(some[0])
        if len(seen) == 30:
            before["it"] = some[0].detach().clone()
            some[0].grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        true(self, some)

    monkeypatch.setattr(steps.DuringBackward, "_measure", broken)
    with pytest.raises(NotFiniteError, match=r"stopped at step 2: the gradient norm is nan on its batch .* the gradient of model\.\S+ is not finite\. Parameters whose"):
        run(model, tmp_path / "out", update_in_backward=True, checkpoint_every=1, **FULL)
    assert torch.equal(seen[-1], before["it"])
    kept = checkpoint.steps(tmp_path / "out" / "run" / "checkpoints")
    assert kept[-1].name == "step-00000001"
    assert all(bool(torch.isfinite(t).all()) for t in read_safetensors(kept[-1] / "trained.safetensors").values())


def test_a_loss_that_is_not_finite_moves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = steps.Losses.parts
    held: list[dict[str, torch.Tensor]] = []

    def parts(losses: steps.Losses, *arguments: Any) -> Iterator[torch.Tensor]:
        held.append({n: p.detach().clone() for n, p in losses.model.named_parameters() if p.requires_grad})
        held.append({n: p for n, p in losses.model.named_parameters() if p.requires_grad})
        for part in true(losses, *arguments):
            yield part * math.inf if len(held) == 6 else part

    monkeypatch.setattr(steps.Losses, "parts", parts)
    with pytest.raises(NotFiniteError, match=r"stopped at step 3: the loss is inf .*Nothing of this step was kept"):
        run(model, tmp_path / "out", update_in_backward=True, **FULL)
    assert same(held[-2], {n: p.detach() for n, p in held[-1].items()})


def test_a_run_goes_on_to_the_same_bits(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**FULL, "optimizer": "frugal", "state": "8bit", "rest_rule": "none", "every": 2, "micro_batch_size": 1, "update_in_backward": True, "checkpoint_every": 2}
    straight = run(model, tmp_path / "straight", **given)
    true, count = steps.run_batch, [0]

    def stops(*arguments: Any, **more: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] > 7:
            raise KeyboardInterrupt
        return true(*arguments, **more)

    monkeypatch.setattr(steps, "run_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", **given)
    monkeypatch.setattr(steps, "run_batch", true)
    assert same(straight, run(model, tmp_path / "cut", **given, resume=True))


def test_pretraining_takes_it_too(model: Path, tmp_path: Path) -> None:
    made = {}
    for during in (False, True):
        out = tmp_path / str(during)
        pretrain(
            str(model.parent / "text.txt"), str(out), architecture=str(model / "config.json"), tokenizer=str(model), steps=3, batch_size=2, sequence_length=32,
            clip=0, update_in_backward=during, quiet=True,
        )  # fmt: skip
        made[during] = read_safetensors(out / "model.safetensors")
    assert same(made[False], made[True])


def test_sharded_parameters_are_refused_by_name() -> None:
    class Sharded(torch.nn.Parameter):
        def full_tensor(self) -> None: ...

    with pytest.raises(EspalierError, match=r"layer\.weight is sharded"):
        InBackward({"layer.weight": Sharded(torch.zeros(2))}, lambda some: None)
