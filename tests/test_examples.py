"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, out: Path, steps: int, *more: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", str(steps), "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_plain_loop(tmp_path: Path) -> None:
    """The loss falls, and the saved delta gives the same logits when it is loaded again."""
    said = run("plain_loop", tmp_path / "out", 12)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0]
    assert "reloaded, it differs by 0.0e+00" in said


def test_trainer_of_transformers(tmp_path: Path) -> None:
    """The Trainer trains the delta's numbers, and they are saved."""
    pytest.importorskip("accelerate")
    assert re.search(r"35 parameters updated, [\d,]{6,} numbers", run("hf_trainer", tmp_path / "out", 5))


def test_demo(tmp_path: Path) -> None:
    """The demonstration with a few steps: both domains before and after, samples, the delta's place and size, its time."""
    old = tmp_path / "old.txt"  # in the place of a third of a million characters, which take a minute
    old.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20000])
    said = run("demo", tmp_path / "out", 3, "--old", str(old))
    for part in ("asyncio (new)", "other packages (old)", "bits per byte", "before", "after", "tokens/s", "memory", "left", " -> "):
        assert part in said, part
    assert re.search(r"The delta is in \S*out: [\d.]+ [KM]iB", said)
    assert re.search(r"This took \d+ seconds", said)
    assert (tmp_path / "out" / "delta.safetensors").exists()


def test_coordinate_check(tmp_path: Path) -> None:
    """Without muP what the blocks give grows with the width; with it, it stays."""
    from transformers import LlamaConfig

    configs = []
    for width in (32, 64, 128):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
        LlamaConfig(vocab_size=64, tie_word_embeddings=False, pad_token_id=0, **sizes).save_pretrained(tmp_path / str(width))
        configs.append(str(tmp_path / str(width) / "config.json"))
    powers = {}
    for mode in ((), ("--standard",)):
        command = [sys.executable, str(EXAMPLES / "coordinate_check.py"), *configs, *mode, "--steps", "3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        powers[mode] = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines()[2:]}
    assert abs(powers[()]["0"]) < 0.5 and powers["--standard",]["0"] > 1
