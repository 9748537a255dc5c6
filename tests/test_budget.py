"""``--budget`` bounds the peak memory of real processes, and refuses what cannot fit before a model is loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.memory.meter import parse_bytes

MODEL_OPTIONS = ["--model", "seedling", "--data", "stdlib:xml", "--steps", "3", "--batch-size", "8", "--threads", "1"]


def tune(out: Path, budget: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "espalier", "tune", *MODEL_OPTIONS, "--out", str(out), "--budget", budget, "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The least budget, as the refusal of a smaller one names it."""
    out = tmp_path_factory.mktemp("refused") / "out"
    refused = tune(out, "64MiB")
    assert refused.returncode == 2 and not out.exists()
    named = re.search(r"--budget 64(?:\.0)? MiB is too small: the least that would do is ([\d.]+ [MG]iB)", refused.stderr)
    assert named, refused.stderr
    assert "what trains" not in refused.stderr, "the model was loaded before the refusal"
    return named[1].replace(" ", "")


@pytest.fixture(scope="module")
def runs(least: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """The least budget and a larger one, each in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    return {budget: tune(folder / budget, budget) for budget in (least, "1.5GiB")}


def test_measured_peak_is_within_the_budget(runs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """VmHWM of the process, as the kernel counts it; prediction and measurement are both printed."""
    for budget, done in runs.items():
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["budget"] == parse_bytes(budget)
        assert result["peak_memory"] <= result["budget"]
        assert result["predicted_peak"] <= result["budget"]
        assert "predicted peak" in done.stderr and "peak memory" in done.stderr


def test_a_larger_budget_is_used(runs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """More memory buys larger micro-batches and no recomputation, for the same loss."""
    small, large = (json.loads(done.stdout) for done in runs.values())
    assert small["plan"]["recompute"] and not large["plan"]["recompute"]
    assert small["plan"]["micro_tokens"] < large["plan"]["micro_tokens"]
    assert small["final_loss"] == pytest.approx(large["final_loss"], rel=5e-3)


# what a method looks at before it starts

WIDE = """
import sys, torch, transformers
from espalier.checkpoint.directory import resolve_model
config = transformers.LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=7168, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(sys.argv[1])
"""
"""One wide block: its gradients in float64 are more than all the rest of a run."""


def test_looking_at_the_data_is_in_the_plan_and_comes_before_the_model(tmp_path: Path) -> None:
    """LoRA-GA holds the gradients of a block, 12 bytes a number beside the 4 of the weight, while no other block is in memory."""
    subprocess.run([sys.executable, "-c", WIDE, str(tmp_path / "wide")], check=True)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 40)
    command = [sys.executable, "-m", "espalier", "tune", "--model", str(tmp_path / "wide"), "--data", str(tmp_path / "text.txt")]
    command += ["--out", str(tmp_path / "out"), "--initialization", "gradient", "--tokens", "32", "--rank", "2", "--targets", "mlp", "--threads", "1"]
    command += ["--steps", "1", "--batch-size", "1", "--sequence-length", "32", "--json"]
    environment = {**os.environ, "ESPALIER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    looking, numbers = result["plan"]["phases"]["data"], 3 * 1024 * 7168
    assert looking["buffers"] > 16 * numbers
    assert result["peak_memory"] - result["import_baseline"] <= 1.12 * (result["predicted_peak"] - result["import_baseline"])
    assert looking["weights"] == 0, "the model is not there yet"
