"""Two gloo processes under FSDP2's ``fully_shard`` train every method to what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from espalier import registry

PLACES = [
    ("llama", "linear,embedding"),
    ("gpt2", "attention,mlp"),
    ("gpt_neox", "attention.qkv"),
    ("qwen3_moe", "experts"),
]
METHODS = [info.name for info in registry.methods() if info.role == "adapter"]
BRANCHES = [info.name for info in registry.methods() if info.role == "brancher" and "needs" not in info.settings]
BRANCHED = ("llama", "gpt2")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("sharding")
    cases = json.dumps([(method, family, targets) for method in METHODS for family, targets in PLACES] + [(method, family, None) for method in BRANCHES for family in BRANCHED])
    worker = Path(__file__).with_name("sharding_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(folder), cases], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.room("adapt")
@pytest.mark.parametrize("family", [family for family, _ in PLACES])
@pytest.mark.parametrize("method", METHODS)
def test_two_sharded_processes_equal_one(method: str, family: str, report: dict[str, dict[str, float]]) -> None:
    _equal(report, method, family)


@pytest.mark.room("branch")
@pytest.mark.parametrize("family", BRANCHED)
@pytest.mark.parametrize("method", BRANCHES)
def test_two_sharded_processes_with_branches_equal_one(method: str, family: str, report: dict[str, dict[str, float]]) -> None:
    _equal(report, method, family)


def _equal(report: dict[str, dict[str, float]], method: str, family: str) -> None:
    found = report[f"{method} {family}"]
    assert found["count"] > 0
    assert found["loss"] < 1e-5
    assert found["tensors"] < 1e-5
