"""The loop as ``tune`` runs it: what evaluating, stopping, resuming and masks must and must not change."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FUNCTIONS, save_model
from rich.console import Console
from transformers import AutoTokenizer

from espalier.checkpoint.safetensors_file import read_safetensors
from espalier.data.encode import Encoder
from espalier.display import Display
from espalier.errors import EspalierError, NotFiniteError
from espalier.train import checkpoint, steps
from espalier.verbs.eval import eval
from espalier.verbs.tune import tune

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("loop") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loop") / "text.txt"
    path.write_text(FUNCTIONS)
    return path


def run(model: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    """A small run with dropout (so that the random state matters), at a rate at which something happens."""
    settings = {"steps": 6, "batch_size": 2, "sequence_length": 32, "learning_rate": 0.01, "quiet": True}
    return tune(str(model), str(data), str(out), **{**settings, **options})


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(out) if "loss" in r]


def evaluations(out: Path, data: Path) -> dict[int, float]:
    """Step -> held-out loss; a step that was measured twice is an error."""
    found = [(r["step"], r["evaluation"][str(data)]["loss"]) for r in records(out) if "evaluation" in r]
    assert len(dict(found)) == len(found)
    return dict(found)


# evaluating in the middle


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"dropout": 0.2}),
        ("mos", {}),
        ("dora", {"recompute": True}),
        ("full", {"optimizer": "muon", "micro_batch_size": 1}),
    ],
)
def test_measuring_in_the_middle_changes_no_bit(method: str, options: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    outs = tmp_path / "measured", tmp_path / "plain"
    result = run(model, text, outs[0], method=method, eval_data=[str(text)], eval_every=2, **options)
    run(model, text, outs[1], method=method, **options)
    for name in ("delta.safetensors", "delta.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert losses(outs[0]) == losses(outs[1]) and len(losses(outs[0])) == 6
    measured = evaluations(outs[0], text)
    assert list(measured) == [2, 4], "the last step is measured afterwards"
    scores = result["evaluation"][str(text)]
    assert scores["after"]["loss"] < measured[4] < measured[2] < scores["before"]["loss"]


def test_what_is_measured_in_the_middle_is_the_model_of_that_step(model: Path, text: Path, tmp_path: Path) -> None:
    """Without dropout, with the updates of that moment: as a run that ends there."""
    run(model, text, tmp_path / "long", dropout=0.2, eval_data=[str(text)], eval_every=3, schedule="constant")
    short = run(model, text, tmp_path / "short", dropout=0.2, eval_data=[str(text)], steps=3, schedule="constant")
    assert evaluations(tmp_path / "long", text)[3] == short["evaluation"][str(text)]["after"]["loss"]


# families with experts


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen3_moe", "linear"), ("qwen3_moe", "attention"), ("mixtral", "experts"), ("gpt_oss", "linear")],
)
def test_experts_are_planned_and_trained(family: str, targets: str, text: Path, tmp_path: Path) -> None:
    """Planning has no data: it cannot know how many tokens an expert gets, and attention may not be one that packs."""
    model = save_model(tmp_path / "model", family=family)
    result = run(model, text, tmp_path / "out", targets=targets, eval_data=[str(text)], steps=2)
    scores = result["evaluation"][str(text)]
    assert scores["after"]["loss"] < scores["before"]["loss"] and result["plan"]["phases"]["steady state"]["trained"] == 4 * result["trained"]


# metrics


class Stopped(Exception):
    """Stands for whatever ends a process."""


def failing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, which raises at its ``call``-th call."""
    calls = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return function(*arguments)

    return wrapped


def test_metrics_are_one_line_a_step_after_stopping_and_resuming(model: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "dropout": 0.2, "eval_data": [str(text)], "eval_every": 2, "checkpoint_every": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model, text, whole, **options)
    for call in (3, 7, 4):  # before any checkpoint, then twice after the one of step 4
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(steps, "accumulate", failing(steps.accumulate, call))
            run(model, text, cut, resume=cut.exists(), **options)
    assert [step for step, _ in losses(cut)] == [1, 2, 3, 4, 5, 6, 7]
    with (cut / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a write
    run(model, text, cut, resume=True, **options)
    assert losses(cut) == losses(whole) and [step for step, _ in losses(cut)] == list(range(1, 9))
    assert evaluations(cut, text) == evaluations(whole, text) and list(evaluations(cut, text)) == [2, 4, 6]
    assert (cut / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adalora", {"rank": 2, "interval": 1}), ("increlora", {"rank": 2, "matrices": 8}), ("sora", {"threshold": 0.02}),
        ("lamda", {"rank": 4, "freeze": 0.5}), ("allora", {}), ("eva", {"rank": 2, "tokens": 256}), ("lora", {"ratio": 16.0}),
        ("lora", {"ratio": 16.0, "optimizer": "muon"}), ("sora", {"optimizer": "muon"}),
        ("lora", {"rank": 2, "initialization": "pissa"}), ("hydra", {}), ("svfit", {}), ("dsee", {"rank": 2}), ("binary", {"rank": 4}),
        ("lisa", {"layers": 1, "every": 2, "state": "8bit"}), ("lisa", {"layers": 1, "every": 2, "optimizer": "lion"}),
        ("gradual-magnitude", {"interval": 1, "begin": 0.0, "optimizer": "muon"}), ("sltrain", {"rank": 4, "state": "8bit", "full": "embedding"}),
        ("full", {"optimizer": "fira", "rank": 4, "every": 2}), ("full", {"optimizer": "frugal", "every": 2, "state": "bf16"}),
    ],
)  # fmt: skip
def test_a_method_with_a_course_resumes_to_the_same_bits(method: str, options: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model, text, whole, method=method, **{**options, "steps": 8, "checkpoint_every": 3})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(steps, "accumulate", failing(steps.accumulate, 6))
        run(model, text, cut, method=method, **{**options, "steps": 8, "checkpoint_every": 3})
    run(model, text, cut, method=method, resume=True, **{**options, "steps": 8, "checkpoint_every": 3})
    assert losses(cut) == losses(whole)
    assert (cut / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()


def test_a_method_is_as_large_as_the_trained_numbers_may_be(model: Path, text: Path, tmp_path: Path) -> None:
    few = run(model, text, tmp_path / "few", steps=1, trainable="5k")
    assert 4_000 < few["trained"] <= 5_000 and json.loads((tmp_path / "few" / "delta.json").read_text())["hyperparameters"]["rank"] > 1
    assert run(model, text, tmp_path / "bytes", steps=1, trainable="20kB")["trained"] == few["trained"]
    recipe = yaml.safe_load((tmp_path / "few" / "run" / "recipe.yaml").read_text())
    again = tune(out=str(tmp_path / "again"), quiet=True, **recipe)
    assert again["trained"] == few["trained"] and again["final_loss"] == few["final_loss"]
    for given, options, message in (
        ("5k", {"rank": 3}, "give --rank or --trainable, not both"), ("a few", {}, "trainable is 'a few'"), ("3", {}, "3 are allowed"),
    ):  # fmt: skip
        with pytest.raises(EspalierError, match=message):
            run(model, text, tmp_path / "bad", steps=1, trainable=given, **options)


# numbers that are not finite


def finite(folder: Path) -> bool:
    """Whether every trained number of a checkpoint, which must be whole, is finite."""
    checkpoint.check(folder)
    return all(bool(torch.isfinite(t).all()) for t in read_safetensors(folder / "trained.safetensors").values())


def test_a_loss_of_nan_is_one_error_and_leaves_the_last_good_checkpoint(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["tune", "--model", model, "--data", text, "--out", out, "--steps", 9, "--batch-size", 2, "--sequence-length", 32]
    arguments += ["--learning-rate", "1e30", "--clip", 0, "--warmup", 0, "--checkpoint-every", 1, "--micro-batch-size", 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "espalier", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr and not done.stdout
    found = re.match(
        r"error: stopped at step (\d+): the loss is nan on its batch of (\d+) tokens in 2 micro-batches \(epoch (\d+), from window \d+ of its order\); "
        r"(?:parameter|the gradient of) model\.layers\.\d+\.\S+ is not finite\. Nothing of this step was kept",
        errors[0],
    )
    assert found and int(found[2]) > 32
    step = int(found[1])
    assert [s for s, _ in losses(out)] == list(range(1, step)) and all(math.isfinite(loss) for _, loss in losses(out))
    last = checkpoint.steps(out / "run" / "checkpoints")[-1]
    assert last.name == f"step-{step - 1:08d}" and finite(last)
    assert not (out / "delta.json").exists()


@pytest.mark.parametrize("when", ["at a checkpoint", "at the end"])
def test_a_parameter_that_a_step_makes_infinite_is_never_written(when: str, model: Path, text: Path, tmp_path: Path) -> None:
    """The gradient is finite, the rate is finite, their product is beyond float32."""
    out = tmp_path / "out"
    options = {"steps": 3, "checkpoint_every": 1} if when == "at a checkpoint" else {"steps": 1, "checkpoint_every": 0}
    with pytest.raises(NotFiniteError, match=r"stopped at step 1: it made parameter model\.layers\.\d+\.\S+ infinite or NaN"):
        run(model, text, out, learning_rate=1e39, warmup=0.0, schedule="constant", **options)
    assert [p.name for p in checkpoint.steps(out / "run" / "checkpoints")] == ["step-00000000"]
    assert finite(out / "run" / "checkpoints" / "step-00000000") and not (out / "delta.json").exists()


@pytest.mark.parametrize(
    ("loss", "gradient", "words"),
    [
        (math.nan, 1.0, "the loss is nan on its batch of .*; every trained parameter and gradient is finite"),
        (math.inf, 1.0, "the loss is inf on its batch of "),
        (1.0, math.inf, r"the gradient norm is inf on its batch of .*; the gradient of model\.layers\.0\.\S+ is not finite"),
        (1.0, math.nan, r"the gradient norm is nan on its batch of .*; the gradient of model\.layers\.0\.\S+ is not finite"),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_that_is_not_finite_reaches_no_parameter(
    loss: float, gradient: float, words: str, clip: float, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[int] = []
    held: dict[str, torch.nn.Parameter] = {}
    true = steps.accumulate

    def accumulate(losses: steps.Losses, batches: Any, weigh: Any) -> float:
        stepped.append(len(stepped) + 1)
        found = true(losses, batches)
        if len(stepped) < 3:
            return found
        held.update({n: p for n, p in losses.model.named_parameters() if p.requires_grad})
        next(iter(held.values())).grad.view(-1)[0] *= gradient  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(steps, "accumulate", accumulate)
    with pytest.raises(NotFiniteError, match="stopped at step 3: " + words):
        run(model, text, tmp_path / "out", clip=clip, checkpoint_every=2)
    saved = read_safetensors(tmp_path / "out" / "run" / "checkpoints" / "step-00000002" / "trained.safetensors")
    assert saved.keys() == held.keys() and all(torch.equal(p, saved[n]) for n, p in held.items())


# chats


@pytest.fixture
def chatty(tmp_path: Path) -> tuple[Path, Path]:
    """A model whose tokenizer has a chat template, and chats."""
    data = tmp_path / "chat.jsonl"
    chats = [
        [{"role": "user", "content": f"what is {i} plus {i}?"}, {"role": "assistant", "content": f"it is {2 * i}."}] for i in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return save_model(tmp_path / "model", TEMPLATE), data


def test_a_chat_is_shown_with_its_targets_before_the_first_step(
    chatty: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    first = steps.accumulate

    def accumulate(losses: steps.Losses, batches: Any, weigh: Any) -> float:
        shown.append(capsys.readouterr().err)
        return first(losses, batches)

    monkeypatch.setattr(steps, "accumulate", accumulate)
    run(*chatty, tmp_path / "out", steps=2, quiet=False)
    end = AutoTokenizer.from_pretrained(chatty[0]).eos_token
    assert f"only the marked text is learnt:\nuser\nwhat is 0 plus 0?{end}assistant\n[[it is 0.{end}]]\n" in shown[0]
    assert len(shown) == 2 and "[[" not in shown[1]


def test_on_a_terminal_the_targets_are_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = Console(file=file, force_terminal=True, color_system="standard", highlight=False, emoji=False)
    monkeypatch.setattr(Display, "console", console)
    Display().spans("title", [("ask [bold]", False), ("answer [/]", True)])
    assert "\x1b[2mask [bold]\x1b[0m\x1b[1;32manswer [/]\x1b[0m" in file.getvalue()


def test_a_delta_of_chats_knows_its_template_and_is_not_used_with_another(chatty: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    model, data = chatty
    out = tmp_path / "out"
    run(model, data, out, steps=2)
    manifest = json.loads((out / "delta.json").read_text())
    encoder = Encoder(AutoTokenizer.from_pretrained(model))
    assert manifest["chat_template"] == encoder.template_fingerprint and manifest["chat_template"].startswith("sha256:")
    assert manifest["tokenizer"] == encoder.fingerprint and manifest["special_tokens"] == encoder.special_tokens
    assert manifest["mask_policy"] == "assistant turns only"

    def score(what: Path) -> float:
        return eval(str(model), str(what), delta=[str(out)], sequence_length=32, quiet=True)["loss"]

    assert math.isfinite(score(data))
    stored = model / "chat_template.jinja"
    assert stored.read_text() == TEMPLATE
    stored.write_text(TEMPLATE.replace("{{ m.role }}", " {{ m.role }}").replace("assistant", " assistant"))
    with pytest.raises(EspalierError, match="was trained with another chat template") as refusal:
        score(data)
    assert manifest["chat_template"] in str(refusal.value) and len(set(re.findall(r"sha256:\w+", str(refusal.value)))) == 2
    assert math.isfinite(score(text)), "plain text has no template"
    stored.write_text(TEMPLATE)
    assert math.isfinite(score(data))


# what is shown


def test_a_bar_inside_a_bar_shares_its_display(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    display = Display()
    with display.bar("training", 2) as outer:
        live = display._live
        outer(1)
        with display.bar("measuring", 3) as inner:
            inner(3)
            assert live is not None and display._live is live and len(live.tasks) == 2
            display.note("between")
        assert [task.description for task in live.tasks] == ["training"]
    assert display._live is None and "between" in capsys.readouterr().err


def test_the_bar_of_a_measurement_ends_at_its_total(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where only a part of the tokens is measured."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"def f{i}():", "completion": " pass"}) + "\n" for i in range(3)))
    eval(str(model), str(data))
    (done, total) = re.findall(r"measuring .* (\d+)/(\d+) tokens", capsys.readouterr().err)[-1]
    assert done == total


# from Python


def test_paths_are_as_good_as_strings(model: Path, text: Path, tmp_path: Path) -> None:
    for out, kind in ((tmp_path / "strings", str), (tmp_path / "paths", Path)):
        options: dict[str, Any] = {"steps": 1, "batch_size": 1, "sequence_length": 16, "rank": 2, "quiet": True}
        tune(kind(model), kind(text), kind(out), eval_data=[kind(text)], **options)
    recipes = [(tmp_path / name / "run" / "recipe.yaml").read_text() for name in ("strings", "paths")]
    assert recipes[0] == recipes[1]


def test_an_option_is_the_same_from_a_command_line_and_from_python(model: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "batch_size": 1, "sequence_length": 16, "quiet": True}
    first = tune(str(model), str(text), str(tmp_path / "out"), rank="2", **options)
    assert tune(str(model), str(text), str(tmp_path / "out"), rank=2, resume=True, **options) == first
