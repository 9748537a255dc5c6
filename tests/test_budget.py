"""``--budget`` bounds the peak memory of real processes, and refuses what cannot fit before a model is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.memory.meter import parse_bytes

MODEL_OPTIONS = ["--model", "seedling", "--data", "stdlib:xml", "--steps", "3", "--batch-size", "8", "--threads", "2"]


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


@pytest.mark.parametrize("budget", ["least", "900MiB", "1.5GiB"])
def test_measured_peak_is_within_the_budget(budget: str, least: str, tmp_path: Path) -> None:
    """VmHWM of the process, as the kernel counts it, at the least budget and at two larger ones."""
    bound = least if budget == "least" else budget
    done = tune(tmp_path / "out", bound)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["budget"] == parse_bytes(bound)
    assert result["peak_memory"] <= result["budget"]
    assert result["predicted_peak"] <= result["budget"]
    assert "predicted peak" in done.stderr and "of the" in done.stderr and "peak memory" in done.stderr


def test_a_larger_budget_is_used(least: str, tmp_path: Path) -> None:
    """More memory buys larger micro-batches or fewer recomputations, for the same loss."""
    small, large = (json.loads(tune(tmp_path / name, bound).stdout) for name, bound in (("a", least), ("b", "1.5GiB")))
    assert small["plan"]["recompute"] and not large["plan"]["recompute"]
    assert small["plan"]["micro_tokens"] < large["plan"]["micro_tokens"]
    assert small["final_loss"] == pytest.approx(large["final_loss"], rel=5e-3)
