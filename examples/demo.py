"""The first thing to run (``make demo``): adapt the bundled model to text that it has never seen, inside a memory budget.

Seedling has read the Python standard library without its packages asyncio, email and xml. Here it learns asyncio
as a LoRA delta, and we look at what it gained, what it forgot, and what the delta weighs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import espalier
from espalier.memory.meter import format_bytes

MODEL, BUDGET = "seedling", "1280MiB"
NEW, NEW_HELD_OUT, OLD_HELD_OUT = "stdlib:asyncio:train", "stdlib:asyncio:heldout", "stdlib:valid"
PROMPT = '''class Mailbox:
    """A queue of messages between tasks."""

    def __init__(self, loop):
        self._loop = loop
        self._waiters = collections.deque()

    async def receive(self):'''


def compare(console: Console, result: dict[str, Any], old: str) -> None:
    """The table of perplexity and bits per byte, before and after, on the new domain and on the old."""
    table = Table(title="what it learnt, and what it forgot (before -> after)", title_justify="left", title_style="bold")
    table.add_column("held-out text", no_wrap=True)
    for column in ("perplexity", "bits per byte", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, label in ((NEW_HELD_OUT, "asyncio (new)"), (old, "other packages (old)")):
        before, after = result["evaluation"][name]["before"], result["evaluation"][name]["after"]
        table.add_row(
            label, f"{before['perplexity']:.3f} -> {after['perplexity']:.3f}",
            f"{before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f}",
            f"{after['bits_per_byte'] / before['bits_per_byte'] - 1:+.1%}",
        )  # fmt: skip
    console.print(table)


def sample(console: Console, title: str, delta: list[str]) -> None:
    """A continuation of the prompt."""
    made = espalier.generate(MODEL, PROMPT, delta=delta, max_tokens=96, temperature=0.6, seed=1, quiet=True)
    console.print(f"\n{title}", style="bold")
    console.print(PROMPT, style="dim", end="", markup=False, highlight=False)
    console.print(made["completion"].rstrip(), markup=False, highlight=False)


def main() -> None:
    """Run the demonstration and print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the delta goes; what is there is replaced")
    parser.add_argument("--steps", type=int, default=80, help="training steps of 4,096 tokens")
    parser.add_argument("--old", default=OLD_HELD_OUT, help="text that shows what is forgotten")
    arguments = parser.parse_args()
    began = time.perf_counter()
    console = Console(highlight=False)
    if arguments.out.exists() and not (arguments.out / "run" / "run.json").exists():
        sys.exit(f"{arguments.out} exists and is not the output of a run; give another --out")
    shutil.rmtree(arguments.out, ignore_errors=True)

    console.print("Espalier: adapt a model to new text", style="bold")
    console.print(
        f"""
  model   {MODEL}, a small Llama that has read the Python standard library but for three packages
  data    the source of one of those, asyncio; a part of its files is kept for measuring
  method  LoRA of rank 16: the model's weights stay as they are, a small delta beside them is trained
  needs   at most {BUDGET} of memory (held by --budget), no network, no GPU, under three minutes on two cores

The same from a shell:
  espalier tune --model {MODEL} --data {NEW} --out {arguments.out} --rank 16 --alpha 32 \\
      --steps {arguments.steps} --learning-rate 0.003 --budget {BUDGET} --eval-data {NEW_HELD_OUT} --eval-data {arguments.old}
""",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    result = espalier.tune(
        MODEL, NEW, str(arguments.out), rank=16, alpha=32.0, steps=arguments.steps, learning_rate=3e-3, budget=BUDGET,
        eval_data=[NEW_HELD_OUT, arguments.old],
    )  # fmt: skip

    compare(console, result, arguments.old)
    sample(console, "before", [])
    sample(console, "after", [str(arguments.out)])
    size, base = result["bytes"], espalier.info(MODEL)["bytes"]
    console.print(
        f"\nThe delta is in {arguments.out}: {format_bytes(size)}, {size / base:.0%} of the model's {format_bytes(base)}. "
        f"Peak memory {format_bytes(result['peak_memory'])} of {BUDGET} allowed.\n"
        f"  espalier info {arguments.out}\n"
        f"  espalier generate --model {MODEL} --delta {arguments.out} --prompt 'async def '\n"
        f"  espalier apply --model {MODEL} --delta {arguments.out} --out DIR    # an ordinary checkpoint\n\n"
        f"This took {time.perf_counter() - began:.0f} seconds.",
        markup=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
