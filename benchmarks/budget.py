"""Is the memory plan true? Predicted and measured peaks of ``espalier tune`` over models, dtypes, methods and cuts.

    python benchmarks/budget.py [--steps 6] [--quick]

Each row is a fresh process; ``measured`` is its VmHWM. The constants ``SPREAD`` and ``LIBRARIES`` of
``plan/memory.py`` come from this table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, make_llama, table, write_result


def measure(model: Path, out: Path, steps: int, **options: object) -> dict[str, object]:
    """The result of one run in a process of its own."""
    command = [sys.executable, "-m", "espalier", "tune", "--model", str(model), "--data", "stdlib:asyncio", "--out", str(out)]
    command += ["--steps", str(steps), "--batch-size", "8", "--quiet", "--json", "--checkpoint-every", "0"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Run the matrix and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="only the small model")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"seedling 4.7M": "seedling"}
        if not arguments.quick:
            models["llama 70M, 32k tokens"] = make_llama(folder / "llama70m")
        cuts = [(1, False), (1, True), (4, False), (8, False), (8, True)]
        cases = itertools.product(models.items(), ("bf16", "fp32"), ("lora", "full"), cuts)
        for number, ((name, model), dtype, method, (micro, recompute)) in enumerate(cases):
            result = measure(
                model, folder / f"out{number}", arguments.steps, dtype=dtype, method=method, micro_batch_size=micro, recompute=recompute
            )
            predicted, measured = result["predicted_peak"] / 2**20, result["peak_memory"] / 2**20
            parts = {k: v / 2**20 for k, v in result["plan"]["parts"].items()}
            rows.append([name, dtype, method, micro * 512, recompute, round(predicted), round(measured), round(measured / predicted, 2)])
            print(rows[-1], {k: round(v) for k, v in parts.items()}, file=sys.stderr, flush=True)
    columns = ("model", "dtype", "method", "micro-batch tokens", "recompute", "predicted MiB", "measured MiB", "ratio")
    print(table(columns, rows))
    write_result("budget", {"machine": machine(), "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
