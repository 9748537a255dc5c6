"""What full tuning takes at its peak: moved after the backward pass, during it, and without one.

    python benchmarks/optimizer_memory.py

A random Llama of 43 M parameters in bf16 (hidden 512, 12 blocks, vocabulary 8,192) trains whole for three steps of 512 tokens in one micro-batch, with
recomputation, so that gradients and not activations are the peak. Each is a fresh process: VmHWM at the end, less what it was
after the imports; beside it what the plan says, less the same. The last loss shows that during and after are the same. About 3 minutes on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, make_llama, table, write_result

CASES = (
    ("lion", {"state": "8bit"}), ("galore", {"state": "8bit", "rank": 64, "choice": "randomized"}), ("adamw", {}), ("mezo", {}),
)  # fmt: skip
ONE = """
import json, sys
from espalier.verbs.tune import tune

folder, options = sys.argv[1], json.loads(sys.argv[2])
found = tune(
    folder + "/model", folder + "/text.txt", options.pop("out"), method="full", steps=3, batch_size=4, sequence_length=128, micro_batch_size=4, clip=0,
    learning_rate=1e-5, checkpoint_every=0, recompute=True, dtype="bf16", quiet=True, **options,
)
less = found["import_baseline"]
print(json.dumps({"peak": found["peak_memory"] - less, "predicted": found["predicted_peak"] - less, "loss": found["final_loss"]}))
"""


def main() -> None:
    """Measure all cases and print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder) / "model", vocabulary=8192)
        (Path(folder) / "text.txt").write_text("".join(f"def add_{i}(a, b):\n    return a + {i} * b\n\n\n" for i in range(3000)))
        for name, more in CASES:
            for during in (False, True) if name != "mezo" else (False,):
                options = {"optimizer": name, "update_in_backward": during, "out": f"{folder}/{name} {during}", **more}
                done = subprocess.run([sys.executable, "-c", ONE, folder, json.dumps(options)], capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                when = "none" if name == "mezo" else "during" if during else "after"
                rows.append([name, *(str(v) for v in [more.get("state", "fp32")]), when, found["peak"] >> 20, found["predicted"] >> 20, found["loss"]])
                print(rows[-1], flush=True)
    print("\n" + table(("optimizer", "state", "backward pass", "peak MiB", "planned MiB", "last loss"), rows))
    write_result("optimizer_memory", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
