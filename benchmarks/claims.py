"""Do the headline claims of some papers show in the small? Each by a protocol and a pass line that stand here before it is run.

    python benchmarks/claims.py [--claims adalora,lst] [--steps 120] [--threads 2] [--out runs/compare] [--quick]

But for LST, the protocol is that of ``compare.py`` (same job, effort and ledger: a learning rate chosen from the grid for every setting, three seeds).
"Better" means a mean loss on the held-out files that is lower by more than the larger of the two standard deviations over seeds;
"no worse" that it is not higher by more than that. Prints "shows" or "does not show at this size", and writes results/claims.json; parts (``--claims a,b``)
add up, also several at once over one ``--out``. About 1.5 hours on 2 cores (estimated).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from common import alone, machine, read_result, table, with_row, write_result
from compare import STEPS, Lab

Settings = dict[str, tuple[str, dict[str, Any], float]]
"""Name -> method, options, and the share of the steps that it may take."""
LORA_16 = 369_920
"""Numbers that LoRA of rank 16 trains on seedling."""
TARGETS = 35
"""Matrices of seedling's blocks."""
DIMENSIONS = (64, 128, 256, 512, 1024, 2048, 4096)
"""The grid of d, ascending; all below a thousandth of the 4.7 million numbers that seedling has."""
D90 = 0.9
"""The share of full tuning's gain that d90, the smallest such d of the grid, reaches (arXiv:1804.08838)."""

CLAIMS: dict[str, tuple[str, str, Settings]] = {
    "adalora": (
        "better than LoRA, most of all at a low budget (AdaLoRA)",
        "AdaLoRA of average rank 2 is better than LoRA of rank 2",
        {"mine": ("adalora", {"rank": 2, "alpha": 6.0}, 1.0), "other": ("lora", {"rank": 2, "alpha": 4.0}, 1.0)},
    ),
    "eva": (
        "converges faster than LoRA (EVA)",
        "after a quarter of the steps, a whole schedule in them, EVA is better than LoRA of the same average rank and alpha",
        {"mine": ("eva", {}, 0.25), "other": ("lora", {"alpha": 16.0}, 0.25)},
    ),
    "mos": (
        "better than LoRA with as many trained numbers (MoS: 36.39 against 34.98)",
        "MoS of equivalent rank 2 is better than LoRA of rank 2",
        {"mine": ("mos", {"equivalent_rank": 2}, 1.0), "other": ("lora", {"rank": 2, "alpha": 4.0}, 1.0)},
    ),
    "nola": (
        "as good as LoRA of rank 1 with half its numbers (NOLA)",
        f"NOLA of 128 coefficients a factor trains at most half as many numbers ({2 * 128 * TARGETS:,}) as LoRA of rank 1, and is no worse",
        {"mine": ("nola", {"coefficients": 128, "targets": "linear"}, 1.0), "other": ("lora", {"rank": 1, "alpha": 2.0}, 1.0)},
    ),
    "randlora": (
        "full-rank updates beat LoRA with as many trained numbers (RandLoRA)",
        "RandLoRA that trains at most as many numbers as LoRA of rank 16 is better than it",
        {"mine": ("randlora", {"trainable": str(LORA_16)}, 1.0), "other": ("lora", {}, 1.0)},
    ),
    "lst": (
        "saves 69 % of the training memory, LoRA 26 % (LST), so has 0.42 of LoRA's peak",
        "the peak of three steps of 1,024 tokens on the 70 M shape of step_cost.py is at most 0.7 of LoRA's, half of the way to 0.42",
        {},
    ),
    "intrinsic": (
        "a few hundred to thousand dimensions reach 90 % of full tuning (arXiv:2012.13255)",
        f"there is a d90 among {', '.join(map(str, DIMENSIONS))}, all below a thousandth of the model's numbers: a d with at least 90 % of what "
        "full tuning gains; d is tried upwards until one has",
        {"full": ("full", {}, 1.0)} | {f"d = {d}": ("intrinsic", {"dimensions": d}, 1.0) for d in DIMENSIONS},
    ),
}
"""Claim -> what the paper says, the pass line, and what is run for it."""


def judge(claim: str, rows: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    """Whether the pass line is reached, and by what figures."""
    if claim == "intrinsic":
        shares = shares_of_full(rows)
        d90 = next((name.removeprefix("d = ") for name, share in shares.items() if share >= D90), None)
        tried = ", ".join(f"{name}: {share:.0%}" for name, share in shares.items())
        gain = rows["full"]["base loss"] - rows["full"]["loss"]
        return d90 is not None, f"d90 is {d90 or f'above {DIMENSIONS[-1]}'} ({tried} of {gain:.4f})"
    mine, other = rows["mine"], rows["other"]
    figures = "; ".join(f"{row['method']}: {row['loss']:.4f} ± {row['deviation']:.4f} of {row['trained']:,}" for row in (mine, other))
    spread = max(mine["deviation"], other["deviation"])
    if claim == "nola":
        return 2 * mine["trained"] <= other["trained"] and mine["loss"] <= other["loss"] + spread, figures
    return mine["loss"] < other["loss"] - spread, figures


def shares_of_full(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The share of full tuning's gain that every other setting has, in the order in which they were run."""
    gain = rows["full"]["base loss"] - rows["full"]["loss"]
    return {name: (row["base loss"] - row["loss"]) / gain for name, row in rows.items() if name != "full"}


def measure(lab: Lab, claim: str, settings: Settings) -> dict[str, dict[str, Any]]:
    """The row of every setting; of the grid of d, of those up to d90."""
    from espalier import registry

    rows: dict[str, dict[str, Any]] = {}
    for name, (method, options, share) in settings.items():
        rows[name] = lab.row(registry.find(method), options=options, share=share)
        if "refused" in rows[name]:
            raise SystemExit(f"{claim} cannot be judged: {name}: {rows[name]['refused']}")
        if claim == "intrinsic" and any(share >= D90 for share in shares_of_full(rows).values()):
            break
    return rows


def judge_memory(threads: int, quick: bool) -> tuple[bool, str]:
    """LST's peak beside LoRA's, as step_cost.py measures peaks."""
    from step_cost import default_dtype, peak

    a = argparse.Namespace(shape="70m", tokens=64 if quick else 1024, dtype=default_dtype(), threads=threads)
    mine, other = peak(a, "ours", "lst"), peak(a, "ours", "lora")
    return mine <= 0.7 * other, f"{mine / 2**20:.0f} MiB, LoRA's {other / 2**20:.0f} MiB: {mine / other:.2f}"


def publish(a: argparse.Namespace, verdict: dict[str, Any]) -> None:
    """Put a verdict among those of runs of as many steps."""
    with alone(a.out / "claims.json"):
        before = read_result("claims")
        kept = before["verdicts"] if before.get("steps") == a.steps else []
        write_result("claims", {"machine": machine(), "steps": a.steps, "verdicts": with_row(kept, verdict, ("claim",))})


def main() -> None:
    """Run what was asked for, and say what shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", default=",".join(CLAIMS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="that of compare.py, whose runs are used again")
    parser.add_argument("--quick", action="store_true", help="a few steps at one rate, to see that it runs; nothing is published")
    a = parser.parse_args()
    a.job, a.package = "package", "asyncio"
    from espalier import registry

    lab, verdicts = Lab(a), []
    for claim in a.claims.split(","):
        says, line, settings = CLAIMS[claim]
        if claim not in {info.name for info in registry.methods()}:
            print(f"{claim}: no method has that name", file=sys.stderr)
            continue
        rows = measure(lab, claim, settings)
        shows, figures = judge(claim, rows) if settings else judge_memory(a.threads, a.quick)
        verdicts.append({"claim": claim, "says": says, "pass line": line, "verdict": "shows" if shows else "does not show at this size", "figures": figures})
        print(json.dumps(verdicts[-1]), file=sys.stderr, flush=True)
        if not a.quick:
            publish(a, verdicts[-1])
    if not verdicts:
        return
    print(table(list(verdicts[0]), [list(verdict.values()) for verdict in verdicts]))


if __name__ == "__main__":
    main()
