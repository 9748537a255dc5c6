"""Real processes, really killed: a run goes on to the same bits, and nothing half-written is ever left."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import tiny
from processes import arm, command_line

from espalier.checkpoint.atomic import atomic_directory
from espalier.checkpoint.directory import resolve_model
from espalier.train import checkpoint

STEPS, EVERY = 12, 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 (with dropout, so that the random state matters) with seedling's tokenizer, and a text."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("survival")
    tiny("gpt2", vocab_size=4096).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder / "model")
    text = "".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(400))
    (folder / "text.txt").write_text(text)
    return folder


def command(work: Path, out: Path, *more: str) -> list[str]:
    """The arguments of the run that every test here does."""
    options = shlex.split("--steps 12 --checkpoint-every 3 --batch-size 2 --sequence-length 32 --threads 1 --dropout 0.1 --seed 4")
    return ["tune", "--model", str(work / "model"), "--data", str(work / "text.txt"), "--out", str(out), *options, *more]


def run(arguments: list[str], moment: str = "", count: int = 0) -> subprocess.CompletedProcess[str]:
    """One process; with a moment, one that kills itself at the ``count``-th of these."""
    return command_line(*arguments, before=functools.partial(arm, moment, count) if moment else None)


@pytest.fixture(scope="module")
def uninterrupted(work: Path) -> Path:
    out = work / "uninterrupted"
    done = run(command(work, out))
    assert done.returncode == 0, done.stderr
    return out


def finish(work: Path, out: Path) -> None:
    done = run(command(work, out, "--resume"))
    assert done.returncode == 0, done.stderr


def assert_same_bits(out: Path, reference: Path) -> None:
    for name in ("delta.safetensors", "delta.json", "adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name

    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        return [(record["step"], record["loss"]) for record in map(json.loads, lines)]

    assert losses(out) == losses(reference)
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    assert not list(out.rglob(".*tmp-*"))


@pytest.mark.parametrize(
    ("moment", "count"),
    [("step", 5), ("file", 8), ("rename", 4), ("rename", 1)],
    ids=["between checkpoints", "inside a checkpoint write", "between rename and directory fsync", "at the very first write"],
)
def test_a_killed_run_resumes_to_the_same_bits(moment: str, count: int, work: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed = run(command(work, out), moment, count)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "delta.json").exists()
    finish(work, out)
    assert_same_bits(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_again_and_again_ends_in_the_same_bits(seed: int, work: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Killed from outside at random times, and by itself inside writes, until it gets through."""
    chance = random.Random(seed)
    out = tmp_path / "run"
    began = time.monotonic()
    assert run(command(work, tmp_path / "timing")).returncode == 0
    duration = time.monotonic() - began
    for attempt in range(4):
        resume = ("--resume",) if out.exists() else ()
        if attempt % 2:
            moment, count = chance.choice([("file", chance.randint(1, 40)), ("rename", chance.randint(1, 20)), ("step", chance.randint(1, 12))])
            run(command(work, out, *resume), moment, count)
            continue
        process = subprocess.Popen(
            [sys.executable, "-m", "espalier", *command(work, out, *resume)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        time.sleep(duration * chance.uniform(0.3, 1.0))
        process.kill()
        process.wait()
    finish(work, out)
    assert_same_bits(out, uninterrupted)


@pytest.fixture(scope="module")
def half(work: Path) -> Path:
    """A run killed after its seventh step; tests take copies."""
    return killed_half_way(work, work / "half")


def killed_half_way(work: Path, out: Path) -> Path:
    assert run(command(work, out), "step", 8).returncode == -signal.SIGKILL
    return out


def half_done(half: Path, out: Path) -> list[Path]:
    """A copy of the half-done run; returns its checkpoints."""
    shutil.copytree(half, out)
    found = checkpoint.steps(out / "run" / "checkpoints")
    assert [p.name for p in found] == ["step-00000003", "step-00000006"]
    return found


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal: exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "file missing", "state cut short", "state bit flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_is_still_there(damage: str, work: Path, half: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    before, last = half_done(half, out)
    file = last / ("state.json" if damage.startswith("state") else "optimizer.safetensors")
    content = file.read_bytes()
    if damage == "file missing":
        file.unlink()
    elif damage == "state bit flipped":  # a digit of the place in the data: JSON as good as before
        place = content.index(b'"position": ') + len(b'"position": ')
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "bit flipped":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    else:
        file.write_bytes(content[: len(content) // 2])
    message = refused(run(command(work, out, "--resume")))
    assert str(last) in message and before.name in message
    assert checkpoint.check(before)["step"] == 3
    assert not (out / "delta.json").exists()


def test_what_the_error_advises_works(work: Path, half: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, last = half_done(half, out)
    (last / "trained.safetensors").write_bytes(b"")
    refused(run(command(work, out, "--resume")))
    shutil.rmtree(last)
    finish(work, out)
    assert_same_bits(out, uninterrupted)


def test_a_base_that_changed_since_is_refused_by_name(work: Path, tmp_path: Path) -> None:
    from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors

    shutil.copytree(work / "model", tmp_path / "model")
    moved = tmp_path / "text.txt"
    shutil.copyfile(work / "text.txt", moved)
    out = tmp_path / "run"
    killed_half_way(tmp_path, out)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = read_safetensors(weights)
    tensors["transformer.ln_f.weight"] += 1
    write_safetensors(weights, tensors, {"format": "pt"})
    message = refused(run(command(tmp_path, out, "--resume")))
    assert "base fingerprint changed" in message and message.count("sha256:") == 2


def test_another_command_is_refused_by_name_on_resume(work: Path, half: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    half_done(half, out)
    assert "--resume" in refused(run(command(work, out)))
    message = refused(run([*command(work, out, "--resume"), "--learning-rate", "0.5"]))
    assert "learning_rate is 0.5" in message


def test_resuming_a_finished_run_says_so_and_changes_nothing(work: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "delta.safetensors").stat().st_mtime_ns
    done = run(command(work, uninterrupted, "--resume", "--json"))
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == STEPS
    assert (uninterrupted / "delta.safetensors").stat().st_mtime_ns == before
    assert "rank is 3" in refused(run([*command(work, uninterrupted, "--resume"), "--rank", "3"]))


def test_what_a_dead_writer_of_our_own_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """In a container the process that follows a killed one often has its number."""
    (tmp_path / f".new.tmp-{os.getpid()}").mkdir()
    with atomic_directory(tmp_path / "new") as temporary:
        (temporary / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_is_one_error_and_leaves_the_last_checkpoint(work: Path, tmp_path: Path) -> None:
    """A real file system of one megabyte; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        message = refused(run(command(work, disk / "run")))
        assert "MiB free" in message
        assert not (disk / "run" / "delta.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_writing_that_fails_in_mid_run_is_one_error_and_leaves_the_last_checkpoint(
    work: Path, half: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The kernel refuses further bytes (a limit on file size stands for a disk that fills up during the run)."""
    out = tmp_path / "run"
    half_done(half, out)
    done = command_line(*command(work, out, "--resume"), before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)))
    assert "File too large" in refused(done)
    found = checkpoint.steps(out / "run" / "checkpoints")
    assert found and checkpoint.check(found[-1])["step"] >= 6
    finish(work, out)
    assert_same_bits(out, uninterrupted)
