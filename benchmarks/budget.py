"""Is the memory plan true? Predicted and measured peaks of ``espalier tune`` over models, methods, optimizers and cuts.

    python benchmarks/budget.py [--only WORD] [--again | --predict]

Each case is a fresh process; ``measured`` is its VmHWM. Both sides are shown without the import baseline, which that process measured
itself. The constants of ``plan/memory.py`` come from this table. What was measured is kept by case, so that the cases can be run a few at
a time; ``--predict`` takes the predictions anew from ``espalier plan``, which runs nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine, make_llama, table, write_result

SEEDLING, LLAMA = "seedling, 4.7 M", "llama, 70 M"
STEPS = 4
TURNS: dict[str, object] = {"steps": 16}
"""Steps in which every block, the lowest too, is likely to have its turn: it has the longest backward pass, for which LISA is planned."""
CASES: dict[str, tuple[str, dict[str, object]]] = {
    f"{model}: {what}": (model, options)
    for model, kinds in {
        SEEDLING: {
            "lora": {},
            "lora, recomputing": {"recompute": True},
            "lora, fp32": {"dtype": "fp32"},
            "lora, micro-batches of 1": {"micro_batch_size": 1},
            "full": {"method": "full"},
            "full, fp32, recomputing": {"method": "full", "dtype": "fp32", "recompute": True},
            "full, micro-batches of 1": {"method": "full", "micro_batch_size": 1},
            "full, adamw in 8 bits": {"method": "full", "state": "8bit"},
            "full, galore": {"method": "full", "optimizer": "galore", "rank": 32},
            "full, mezo": {"method": "full", "optimizer": "mezo", "clip": 0},
            "lisa, frugal in 8 bits": {"method": "lisa", "optimizer": "frugal", "rank": 64, "state": "8bit"},
        },
        LLAMA: {
            "lora": {"sequence_length": 256},
            "lora, recomputing": {"sequence_length": 256, "recompute": True},
            "lora, fp32": {"sequence_length": 256, "dtype": "fp32"},
            "lora, base in 4 bits": {"sequence_length": 256, "base_bits": 4},
            "full": {"sequence_length": 128, "method": "full"},
            "full, micro-batches of 1": {"sequence_length": 128, "method": "full", "micro_batch_size": 1},
            "full, fp32": {"sequence_length": 128, "method": "full", "dtype": "fp32"},
            "full, adamw in 8 bits": {"sequence_length": 128, "method": "full", "state": "8bit"},
            "full, lion in bf16": {"sequence_length": 128, "method": "full", "optimizer": "lion", "state": "bf16"},
            "full, galore": {"sequence_length": 128, "method": "full", "optimizer": "galore", "rank": 64},
            "full, mezo": {"sequence_length": 128, "method": "full", "optimizer": "mezo", "clip": 0},
            "full, frugal": {"sequence_length": 128, "method": "full", "optimizer": "frugal"},
            "lisa": {"sequence_length": 128, "method": "lisa", "method_every": 1, **TURNS},
            "lisa of attention and mlp": {"sequence_length": 128, "method": "lisa", "every": 1, "targets": "attention,mlp", **TURNS},
            "lisa, frugal in 8 bits": {"sequence_length": 128, "method": "lisa", "optimizer": "frugal", "rank": 64, "state": "8bit", "method_every": 1, **TURNS},
        },
    }.items()
    for what, options in kinds.items()
}


def measure(model: Path | str, out: Path, steps: int = STEPS, **options: object) -> dict[str, Any]:
    """The result of one run in a process of its own."""
    data = ["--data", "stdlib:asyncio", "--out", str(out), "--steps", str(steps), "--checkpoint-every", str(steps)]
    return of_espalier("tune", model, data, **options)


def of_espalier(verb: str, model: Path | str, arguments: Sequence[str], **options: object) -> dict[str, Any]:
    """What a verb gives, in a process of its own."""
    command = [sys.executable, "-m", "espalier", verb, "--model", str(model), *arguments, "--batch-size", "8", "--quiet", "--json"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--again", action="store_true", help="also those that have been measured")
    parser.add_argument("--predict", action="store_true", help="only predict, those that have been measured")
    arguments = parser.parse_args()
    path = RESULTS / "budget.json"
    known = {row["case"]: row for row in json.loads(path.read_text())["cases"]} if path.exists() and "cases" in json.loads(path.read_text()) else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, (case, (name, options)) in enumerate(CASES.items()):
            if arguments.only not in case or (case in known) != (arguments.predict or (arguments.again and case in known)):
                continue
            model: Path | str = "seedling"
            if name == LLAMA:
                model = folder / "llama70m"
                if not model.exists():
                    make_llama(model)
            mebi, row = 2**20, known.get(case, {})
            if arguments.predict:
                plan = of_espalier("plan", model, (), **{name: value for name, value in options.items() if name != "clip"})
            else:
                result = measure(model, folder / f"out{number}", **options)
                plan = result["plan"]
                row = {"processor": machine()["processor"], "baseline": round(plan["baseline"] / mebi), "measured": round((result["peak_memory"] - plan["baseline"]) / mebi)}
            phases = {phase: {kind: round(n / mebi, 1) for kind, n in kinds.items() if n} for phase, kinds in plan["phases"].items()}
            row = {"case": case, **row, "predicted": round((plan["predicted_peak"] - plan["baseline"]) / mebi), "phases": phases}
            row["ratio"] = round(row["measured"] / row["predicted"], 3)
            known[case] = row
            print({key: value for key, value in row.items() if key not in ("phases", "processor")}, row["phases"]["steady state"], file=sys.stderr, flush=True)
            write_result("budget", {"machine": machine(), "steps": STEPS, "cases": [known[case] for case in CASES if case in known]})
    columns = ("case", "baseline", "predicted", "measured", "ratio")
    print(table([*columns[:1], *(f"{column} MiB" for column in columns[1:4]), columns[4]], [[row[c] for c in columns] for row in known.values()]))


if __name__ == "__main__":
    main()
