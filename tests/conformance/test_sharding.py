"""Two gloo processes under FSDP2's ``fully_shard`` train every method, with its course, to what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from espalier import registry

PLACES = [
    ("llama", "linear,embedding"),
    ("gpt2", "attention,mlp"),
    ("gpt_neox", "attention.qkv"),
    ("qwen3_moe", "experts"),
]
METHODS = [info.name for info in registry.methods() if info.role == "adapter" and info.settings.get("needs") != "sources"]
BRANCHES = [info.name for info in registry.methods() if info.role == "brancher" and "needs" not in info.settings]
CASES = [(method, *place) for number, method in enumerate(METHODS) for place in (PLACES if number % 4 == 0 else (PLACES[0], PLACES[3]))]
"""Every method on the linear, lookup and experts routes; each fourth on the rest, which differ from these in their layout."""
CODED = [("lora", "llama", "linear", 8), ("dora", "gpt2", "attention,mlp", 4), ("mos", "llama", "linear", 4), ("lora", "qwen3_moe", "experts", 4)]
"""A base that is kept as codes of so many bits, with two micro-batches a step; of 4 bits also with activations recomputed."""
BRANCHED = [(method, family) for number, method in enumerate(BRANCHES) for family in (("llama", "gpt2") if number % 4 == 0 else ("llama",))]
COURSES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, int]]] = {
    # what: method, targets, its options, optimizer, and how often at least something happens
    "layers that take turns": ("lisa", "attention", {"layers": 1, "every": 1}, "adamw", {"forgotten": 12}),
    "layers that take turns, in a subspace": ("lisa", "attention", {"layers": 1, "every": 1}, "galore", {"forgotten": 12}),
    "layers by what they are worth": ("ist", "linear", {"rank": 2, "every": 2, "active": 0.5, "trials": 2}, "adamw", {"changed": 14}),
    "columns that stand still, under clipping": ("lamda", "linear", {"rank": 4, "freeze": 0.5}, "sgd", {}),
    "entries by summed gradients": ("spiel", "mlp", {"every": 3, "collect": 1, "rate": 0.8, "density": 0.1}, "adamw", {"changed": 6, "renewed": 300}),
    "entries by accumulators": ("spiel", "mlp", {"growth": "momentum", "every": 2, "rate": 0.8, "density": 0.1}, "adamw bf16", {"changed": 6, "renewed": 300}),
    "entries by the gradients of a step": ("masked", "mlp", {"score": "gradient", "every": 2, "density": 0.1}, "torch", {"changed": 6, "renewed": 300}),
}
"""Courses in which layers are drawn anew, or entries exchanged, with what an optimizer has of them; sharded and not."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("sharding")
    some = [*((*case, None) for case in CASES), *((method, family, None, None) for method, family in BRANCHED), *CODED]
    cases = {f"{method} {family} {bits}": (method, family, targets, bits, None) for method, family, targets, bits in some}
    for what, (method, targets, options, optimizer, _) in COURSES.items():
        cases[what] = (method, "llama", targets, None, {"options": options, "optimizer": optimizer, "steps": 6, "rate": 0.01, "cuts": 2, "seed": 2, "clip": 0.05 if "clipping" in what else 0.0})
    worker = Path(__file__).with_name("sharding_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(folder), json.dumps(cases)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=900)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.room("adapt")
@pytest.mark.parametrize(("method", "family"), [case[:2] for case in CASES])
def test_two_sharded_processes_equal_one(method: str, family: str, report: dict[str, dict[str, float]]) -> None:
    _equal(report, f"{method} {family} None")


@pytest.mark.room("branch")
@pytest.mark.parametrize(("method", "family"), BRANCHED)
def test_two_sharded_processes_with_branches_equal_one(method: str, family: str, report: dict[str, dict[str, float]]) -> None:
    _equal(report, f"{method} {family} None")


@pytest.mark.room("adapt")
@pytest.mark.parametrize(("method", "family", "bits"), [(method, family, bits) for method, family, _, bits in CODED])
def test_two_sharded_processes_on_codes_equal_one_and_each_holds_half_of_them(
    method: str, family: str, bits: int, report: dict[str, dict[str, float]]
) -> None:
    _equal(report, f"{method} {family} {bits}")
    assert 0.45 < report[f"{method} {family} {bits}"]["held"] < 0.55


@pytest.mark.room("adapt")
@pytest.mark.parametrize("what", COURSES)
def test_a_course_on_two_sharded_processes_is_that_on_one_and_so_is_what_becomes_of_state(what: str, report: dict[str, dict[str, float]]) -> None:
    _equal(report, what)
    assert report[what]["kept"] < 1e-5
    for happened, least in COURSES[what][-1].items():
        assert report[what].get(happened, 0) >= least, happened


def _equal(report: dict[str, dict[str, float]], what: str) -> None:
    found = report[what]
    assert found["count"] > 0
    assert found["loss"] < 1e-5
    assert found["tensors"] < 1e-5
