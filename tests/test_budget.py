"""``--budget`` bounds the peak memory of real processes, and refuses what cannot fit before a model is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.memory.meter import parse_bytes

MODEL_OPTIONS = ["--model", "seedling", "--data", "stdlib:xml", "--steps", "6", "--batch-size", "8", "--threads", "1"]


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
    """The least budget and two larger ones, each in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    return {budget: tune(folder / budget, budget) for budget in (least, "900MiB", "1.5GiB")}


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
    small, _, large = (json.loads(done.stdout) for done in runs.values())
    assert small["plan"]["recompute"] and not large["plan"]["recompute"]
    assert small["plan"]["micro_tokens"] < large["plan"]["micro_tokens"]
    assert small["final_loss"] == pytest.approx(large["final_loss"], rel=5e-3)
