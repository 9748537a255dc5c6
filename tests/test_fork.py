"""Forks of a pretraining run: the bits of a run that had the fork's decay all along, and a trunk that notices nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import tiny
from transformers import AutoTokenizer

import espalier
from espalier.checkpoint.directory import resolve_model
from espalier.errors import EspalierError
from espalier.train import checkpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with dropout, two texts, and a trunk of 12 steps that decays over the last three."""
    folder = tmp_path_factory.mktemp("fork")
    tiny("gpt2", vocab_size=4096).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / "model")
    for name, what in (("text", "add"), ("other", "subtract")):
        (folder / f"{name}.txt").write_text("".join(f"def {what}_{i}(a, b):\n    return a + {i} * b\n\n\n" for i in range(60)))
    run(folder, "trunk", steps=12, warmup=0.25, cooldown=0.25, keep_checkpoints=0)
    return folder


def run(work: Path, out: str, data: str = "text", **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": str(work / "model"), "batch_size": 2, "sequence_length": 32, "learning_rate": 0.01, "schedule": "wsd", "checkpoint_every": 3, "floor": 0.1,
        "dtype": "fp32", "threads": 1, "quiet": True, "optimizer": "adamw", "weight_decay": 0.1,
    }  # fmt: skip
    return espalier.pretrain(str(work / f"{data}.txt"), str(work / out), **{**settings, **options})


def steps(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["learning_rate"]) for line in map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())]


def digest(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_fork_has_the_bits_of_a_run_that_had_its_decay_all_along_and_the_trunk_is_untouched(work: Path) -> None:
    before = digest(work / "trunk")
    for length in (3, 6):
        run(work, f"fork{length}", fork=f"{work / 'trunk'}@6", steps=6 + length, cooldown=length / (6 + length))
        run(work, f"whole{length}", steps=6 + length, warmup=3 / (6 + length), cooldown=length / (6 + length))
        fork, whole = work / f"fork{length}", work / f"whole{length}"
        assert (fork / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert steps(fork) == steps(whole)[6:] and [step for step, _, _ in steps(fork)] == list(range(7, 7 + length))
        assert steps(whole)[:6] == steps(work / "trunk")[:6]
        assert [rate for _, _, rate in steps(fork)] == pytest.approx([0.01 * (1 - 0.9 * (k + 1) / (length + 1)) for k in range(length)])
    assert digest(work / "trunk") == before


def test_a_fork_that_was_killed_goes_on_without_its_trunk(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "trunk", tmp_path / "trunk")
    options: dict[str, Any] = {"fork": f"{tmp_path / 'trunk'}@6", "steps": 12, "cooldown": 0.5}
    run(work, "killed", **options)
    out = work / "killed"
    bits = (out / "model.safetensors").read_bytes()
    for last in ("step-00000012", "step-00000009"):  # as if it had been killed before its first own checkpoint
        if (out / "run" / "checkpoints" / last).exists():
            shutil.rmtree(out / "run" / "checkpoints" / last)
    shutil.copytree(work / "trunk" / "run" / "checkpoints" / "step-00000006", out / "run" / "checkpoints" / "step-00000006", dirs_exist_ok=True)
    (out / "run" / "result.json").unlink(), (out / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "trunk")
    run(work, "killed", resume=True, **options)
    assert (out / "model.safetensors").read_bytes() == bits


def test_the_decay_may_have_data_of_its_own_and_the_last_checkpoint_is_the_default(work: Path) -> None:
    run(work, "short", steps=6, warmup=0.5, cooldown=0.001, schedule="constant")
    run(work, "better", data="other", fork=str(work / "short"), steps=9, cooldown=0.3)
    state = json.loads((work / "better" / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["step"] == 6 and state["cursor"] == {"epoch": 0, "position": 0} and state["tokens"] > 0
    assert len(steps(work / "better")) == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"fork": "@12"}, r"step 10 had the learning rate 0\.00775 there, and would have 0\.01; fork where the trunk has not begun to fall"),
        ({"fork": "@6", "steps": 9, "cooldown": 0.6}, r"step 5 had the learning rate 0\.01 there, and would have"),
        ({"fork": "@5"}, r"no checkpoint of that step; there are: 0, 3, 6, 9, 12"),
        ({"fork": "@6", "steps": 6}, r"--steps is 6; it counts from the trunk's beginning, so it must be more than 6"),
        ({"fork": "@6", "learning_rate": 0.02}, r"learning_rate is 0\.02, and was 0\.01 there; a fork has its trunk's"),
        ({"fork": "@6", "weight_decay": 0.2}, r"weight_decay is 0\.2, and was 0\.1 there"),
        ({"fork": "/nowhere@6"}, r"/nowhere holds no run; give the --out of one, or RUN@STEP"),
    ],
)
def test_what_is_no_continuation_is_refused_before_anything_is_written(options: dict[str, Any], complaint: str, work: Path) -> None:
    fork = options.pop("fork")
    with pytest.raises(EspalierError, match=complaint):
        run(work, "refused", **{"fork": f"{work / 'trunk'}{fork}" if fork[0] == "@" else fork, "steps": 20, "cooldown": 0.1, **options})
    assert not (work / "refused").exists()


def test_a_run_that_was_recorded_when_there_were_fewer_options_had_their_defaults(work: Path) -> None:
    shutil.copytree(work / "trunk", work / "old")
    record = json.loads((work / "old" / "run" / "run.json").read_text())
    for key in ("loss", "reweight", "reweight_temperature", "mup", "fork", "update_in_backward"):
        del record["arguments"][key], record["resolved"][key]
    (work / "old" / "run" / "run.json").write_text(json.dumps(record))
    assert run(work, "old", steps=12, warmup=0.25, cooldown=0.25, keep_checkpoints=0, resume=True)["steps"] == 12
    with pytest.raises(EspalierError, match="loss is 'stablemax', and was 'cross_entropy' there"):
        run(work, "refused", fork=f"{work / 'old'}@6", steps=9, loss="stablemax")
    run(work, "of the old", fork=f"{work / 'old'}@6", steps=7, cooldown=0.1)
    with pytest.raises(EspalierError, match=r"reweight is 'linupper', the run in .* was started with None"):
        run(work, "old", steps=12, warmup=0.25, cooldown=0.25, keep_checkpoints=0, resume=True, reweight="linupper")


def test_a_method_that_goes_by_the_length_of_its_run_is_not_forked_to_another(work: Path) -> None:
    options: dict[str, Any] = {"method": "gradual-magnitude", "sparsity": 0.5, "interval": 1}
    run(work, "pruned", steps=4, warmup=0.25, checkpoint_every=2, **options)
    with pytest.raises(EspalierError, match=r"what gradual-magnitude does in a run may go by its length, which was 4 steps there"):
        run(work, "refused", fork=str(work / "pruned") + "@2", steps=8, **options)


def test_only_the_last_checkpoints_stay_unless_more_are_asked_for(work: Path) -> None:
    names = {out: [p.name[-2:] for p in sorted((work / out / "run" / "checkpoints").iterdir())] for out in ("trunk", "whole3") if (work / out).exists()}
    assert names.pop("trunk") == ["00", "03", "06", "09", "12"]
    assert all(found == ["06", "09"] for found in names.values())


def test_space_is_asked_for_as_many_checkpoints_as_there_will_be(work: Path) -> None:
    there = len(list((work / "trunk" / "run" / "checkpoints").iterdir()))
    assert checkpoint.at_once(12, 3, 0) == there == 5 and checkpoint.at_once(13, 3, 0) == 6
    assert checkpoint.at_once(12, 3, 2) == 2 and checkpoint.at_once(12, 3, 100) == 5 and checkpoint.at_once(10**6, 0, 0) == 1
