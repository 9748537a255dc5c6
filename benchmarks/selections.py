"""What does each selection of a model's own numbers give, and what does it cost? Beside full tuning and LoRA, ours and PEFT's.

    python benchmarks/selections.py [--parts rows,memory,forgetting] [--methods paca,lisa] [--steps 120] [--threads 2] [--out runs/compare] [--quick]

``rows``: the comparison job of ``compare.py`` (the job ``package``), from the same ledger under ``--out``: what has been measured there is not measured again, and
what is measured here is in results/compare.json too.

``memory``: peaks of a process that trains a random Llama of 70 M parameters for :data:`STEPS` steps of 8 times 256 tokens, VmHWM less what it was after the imports,
with the default options. Everything is in one loop, PEFT's layers too, so only the layers differ. LISA draws its blocks anew every other step here, as its peak is where
one set of blocks is left for the next; otherwise each has its default options.

``forgetting``: the packages asyncio, email and xml (data as of ``compare.py``) are learnt one after the other, each delta over those before it, with what the job ``package`` found the best learning
rate; after each the loss on the held-out files of all three and on seedling's own held-out text. A later package's forgetting is what the loss on the
earlier ones gains from the end of their own training to the end of all. HFT draws another half for each.

Every run is a process of its own, kept in the ledger; parts add up, also several at once (disjoint ``--methods``) over one ``--out``. Results go into
results/select.json and the plot into results/select.png as they are made. (The module ``select`` of the standard library must not find a
file of its name beside a script: so this one has another.) On 2 cores the rows take about 10 minutes a method where compare.py
has not made them, the memory 20 minutes in all, and the forgetting 40.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import compare
from common import (
    RESULTS,
    SHAPES,
    alone,
    apart,
    digest,
    make_llama,
    read_result,
    rows_of,
    table,
    versions,
    with_rows,
    write_result,
)
from step_cost import default_dtype

STEPS = 5
BATCH = 8
"""Steps of a run for its peak, and sequences of one."""
REFERENCES = (("lora", "ours"), ("lora", "peft"))
"""What selections are beside, full tuning being one of them."""
MEMORY_OPTIONS = {"lisa": {"every": 2}}
TASKS = ("asyncio", "email", "xml")
FORGETTING = ("full", "hft")
MODEL = "70m"


def work(asked: str) -> list[tuple[Any, str]]:
    """(method, system) of every selection and of what they are beside."""
    from espalier import registry

    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        registry.find(name)
    known = {info.name: info for info in registry.methods()}
    found = [(info, "ours") for info in known.values() if info.kind == "select"] + [(known[name], system) for name, system in REFERENCES]
    return [(info, system) for info, system in found if not names or info.name in names]


# -- runs, in processes of their own


def memory_of(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """Bytes above the imports at the peak of a short run."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import espalier.verbs._training
    import espalier.verbs.tune  # noqa: F401
    from espalier.memory.meter import peak_memory

    if spec["system"] == "peft":
        import peft  # noqa: F401
    before = peak_memory()
    found = {"ours": compare.run_ours, "peft": compare.run_peft}[spec["system"]](spec, out)
    return {"peak": found["peak"] - before, "imports": before, "trained": found["trained"]}


def sequence_of(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """Losses by data after each of the packages, learnt in turn."""
    import espalier

    data = [spec["data"][task]["test"] for task in TASKS] + [spec["data"][TASKS[0]]["own"]]
    folders: list[str] = []
    losses = []
    for number, task in enumerate(TASKS):
        found = espalier.tune(
            "seedling", spec["data"][task]["train"], str(out / task), over=folders or None, method=spec["method"], steps=spec["steps"],
            batch_size=compare.BATCH, sequence_length=compare.LENGTH, learning_rate=spec["rate"], warmup=compare.WARMUP, clip=compare.CLIP,
            eval_data=data, checkpoint_every=0, dtype="fp32", micro_batch_size=compare.BATCH, recompute=False, threads=spec["threads"],
            seed=len(TASKS) * spec["seed"] + number, quiet=True, weight_decay=0.0,
        )  # fmt: skip
        folders = [*folders, str(out / task)]
        scores = [found["evaluation"][name] for name in data]
        if not losses:
            losses.append([score["before"]["loss"] for score in scores])
        losses.append([score["after"]["loss"] for score in scores])
    return {"losses": losses}


# -- the parts


def measured(lab: compare.Lab, info: Any, spec: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A run from the ledger, or now; ``given`` is what it is told beside what it depends on."""
    key = json.dumps({**lab.common, **spec, "method": info.name, "code": digest(info.file)}, sort_keys=True)

    def run() -> dict[str, Any]:
        work = {"memory": memory_of, "forgetting": sequence_of}[spec["what"]]
        found = apart(work, {**spec, **given, "method": info.name, "threads": lab.a.threads})
        print(spec["what"], spec.get("system", ""), info.name, found, file=sys.stderr, flush=True)
        return found

    return lab.ledger.get(key, run)


def memory_row(lab: compare.Lab, info: Any, system: str) -> dict[str, Any]:
    """The peak of one method."""
    model = lab.a.out.resolve() / f"llama-{MODEL}"
    with alone(model):
        if not (model / "config.json").exists():
            make_llama(model, **SHAPES[MODEL])
    dtype = default_dtype()
    spec = {
        "what": "memory", "system": system, "options": MEMORY_OPTIONS.get(info.name, {}), "steps": 2 if lab.a.quick else STEPS, "seed": 0,
        "rate": compare.rate_of(info), "measured": (), "dtype": dtype, "shape": SHAPES[MODEL], "batch": BATCH,
    }  # fmt: skip
    found = measured(lab, info, spec, {"model": str(model), "data": lab.data})
    return {"system": system, "method": info.name, "dtype": dtype, **({"refused": found["failed"]} if "failed" in found else found)}


def forgetting_row(lab: compare.Lab, info: Any) -> dict[str, Any]:
    """The sequence of packages learnt by one method: mean losses and their deviations over the seeds, by when and on what."""
    rate = lab.row(info).get("rate", compare.rate_of(info))
    seeds = compare.SEEDS[:1] if lab.a.quick else compare.SEEDS
    data = {}
    for task in TASKS:
        with alone(lab.a.out / "data"):
            data[task] = compare.write_data(lab.a.out, "package", task, lab.a.quick)
    spec = {"what": "forgetting", "rate": rate, "steps": lab.a.steps, "tasks": TASKS}
    runs = [measured(lab, info, {**spec, "seed": seed}, {"data": data}) for seed in seeds]
    if failed := next((run["failed"] for run in runs if "failed" in run), None):
        return {"method": info.name, "refused": failed}
    losses = [run["losses"] for run in runs]  # seeds, when, what
    mean = [[statistics.mean(run[i][j] for run in losses) for j in range(len(TASKS) + 1)] for i in range(len(TASKS) + 1)]
    lost = [statistics.mean(run[-1][j] - run[j + 1][j] for j in range(len(TASKS) - 1)) for run in losses]
    learnt = [statistics.mean(run[0][j] - run[j + 1][j] for j in range(len(TASKS))) for run in losses]
    own = [run[-1][-1] - run[0][-1] for run in losses]

    def deviation(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    return {
        "method": info.name, "rate": rate, "losses": mean, "learnt": statistics.mean(learnt), "learnt deviation": deviation(learnt),
        "forgetting": statistics.mean(lost), "forgetting deviation": deviation(lost), "own": statistics.mean(own), "own deviation": deviation(own),
    }  # fmt: skip


def publish(lab: compare.Lab, part: str, row: dict[str, Any]) -> None:
    """Put one row among those of its part that were measured under the same conditions."""
    a = lab.a
    conditions = {**lab.common, "steps": a.steps, "seeds": list(compare.SEEDS)}
    if part == "memory":
        conditions = {"shape": MODEL, "steps": STEPS, "batch": BATCH, "length": compare.LENGTH, "dtype": row["dtype"], "threads": a.threads, "process": "a fork after the imports", **versions()}
    with alone(a.out / "select.json"):
        content = read_result("select")
        content[part] = with_rows(content.get(part, {}), conditions, [row], [key for key in ("system", "method") if key in row])
        write_result("select", content)
        plot(content, RESULTS / "select.png")


def plot(content: dict[str, Any], path: Path) -> None:
    """Loss against peak memory, and the losses on each package while the packages are learnt in turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peaks = {(row["system"], row["method"]): row["peak"] / 2**20 for row in content.get("memory", {}).get("rows", []) if "peak" in row}
    rows = [row for row in content.get("rows", {}).get("rows", []) if "loss" in row and (row["system"], row["method"]) in peaks]
    sequences = [row for row in content.get("forgetting", {}).get("rows", []) if "losses" in row]
    if not rows and not sequences:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), constrained_layout=True)
    for row in rows:
        x, theirs = peaks[row["system"], row["method"]], row["system"] == "peft"
        left.errorbar([x], [row["loss"]], [row["deviation"]], fmt="x" if theirs else "o", color="tab:orange" if theirs else "tab:blue", elinewidth=0.8)
        left.annotate(f"{row['method']} (PEFT)" if theirs else row["method"], (x, row["loss"]), xytext=(4, 3), textcoords="offset points", fontsize=8)
    left.set_title("a package that seedling has not seen", loc="left")
    left.set_xlabel(f"peak MiB above the imports, on {MODEL}")
    left.set_ylabel("loss on held-out files (nats a token)")
    for row, style in zip(sequences, ("-", "--", ":", "-."), strict=False):
        for number, task in enumerate(TASKS):
            right.plot(range(len(TASKS) + 1), [losses[number] for losses in row["losses"]], style, color=f"C{number}", marker="o", markersize=4, label=f"{task}, {row['method']}")
    right.set_xticks(range(len(TASKS) + 1), ["before", *(f"after {task}" for task in TASKS)])
    right.set_title("three packages in turn", loc="left")
    right.set_ylabel("loss on held-out files (nats a token)")
    if sequences:
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.margins(x=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shown(value: Any) -> str:
    """A cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run what was asked for, and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="rows,memory,forgetting")
    parser.add_argument("--methods", default="", help="names with commas; default: all selections and LoRA")
    parser.add_argument("--steps", type=int, default=compare.STEPS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="that of compare.py, whose runs are used again")
    parser.add_argument("--quick", action="store_true", help="a few steps at one rate, to see that it runs; nothing is published")
    a = parser.parse_args()
    a.job, a.package = "package", "asyncio"
    lab, todo, broken = compare.Lab(a), work(a.methods), None
    make = {"rows": lambda one: lab.row(*one), "memory": lambda one: memory_row(lab, *one), "forgetting": lambda one: forgetting_row(lab, one[0])}
    columns = {
        "rows": ("system", "method", "rate", "loss", "deviation", "forgetting", "trained", "bytes"),
        "memory": ("system", "method", "trained", "peak", "imports"),
        "forgetting": ("method", "rate", "learnt", "learnt deviation", "forgetting", "forgetting deviation", "own", "own deviation"),
    }
    for part in a.parts.split(","):
        if part not in columns:
            raise SystemExit(f"--parts {part}: there are {', '.join(columns)}")

        def keep(row: dict[str, Any], part: str = part) -> None:
            if not a.quick:
                publish(lab, part, row)
                if part == "rows":
                    compare.publish(lab, row)

        of_part = [one for one in todo if part != "forgetting" or (one[0].name in FORGETTING and one[1] == "ours")]
        rows, failed = rows_of(of_part, make[part], keep)
        broken = failed or broken
        done = [row for row in rows if "refused" not in row]
        print(f"\n{part}\n\n" + table(columns[part], [[shown(row[c]) for c in columns[part]] for row in done]))
        for row in rows:
            if "refused" in row:
                print(f"{row.get('system', 'ours')} {row['method']} has no row: {row['refused']}")
    if broken:
        raise broken


if __name__ == "__main__":
    main()
