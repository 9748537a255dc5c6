"""Does it merge well? Six fine-tunes of seedling, merged by every method with the same tuning effort.

    python benchmarks/merge_quality.py --out runs/merge_quality [--tasks 2,3,4,5,6] [--steps 300] [--threads 2] [--quick]

The tasks, all made from the standard library of the running Python: the source of three packages that seedling has not
seen (asyncio, email, xml), documentation (docstrings as the entries of a manual in reStructuredText), bytecode (listings of ``dis``) and trees (``ast.dump``).
Files are shared out by a hash of their name: about 70 % to train on, 15 % to choose hyperparameters by (valid), 15 % to
measure on (test). Every fine-tune trains all parameters.

For N = 2 to 6 the first N tasks are merged. Every method may try :data:`EFFORT` settings on the valid split, those of
:data:`GRIDS`; the best by mean recovery is measured on the test split. Recovery of a task is the share of what fine-tuning
gained that the merged model has: ``(loss(base) - loss(merged)) / (loss(base) - loss(tuned))``, 1 is the fine-tuned model
and 0 the base; a method's is the mean over the N tasks. Searches (``espalier merge search``) optimise their weights on the
valid split itself, or on its text without looking at the loss (AdaMerging), with evaluations as given in the table.

Everything is kept under ``--out``; a run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import dis
import hashlib
import io
import itertools
import json
import re
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, Ledger, machine, table, write_result

TASKS = ("asyncio", "bytecode", "email", "documentation", "xml", "trees")
EFFORT = 8
SCALES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
SMALL = (0.2, 0.4, 0.7, 1.0)
LARGE = (0.4, 0.7, 1.0, 1.4)
GRIDS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "task_arithmetic": [{"scale": s} for s in (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)],
    "ties": [{"density": d, "scale": s} for d in (0.2, 0.5) for s in LARGE],
    "dare": [{"density": d, "scale": s} for d in (0.5, 0.8) for s in SMALL],
    "dare (ties)": [{"density": d, "scale": s, "elect": "mass"} for d in (0.5, 0.8) for s in LARGE],
    "della (ties)": [{"density": d, "scale": s, "elect": "mass"} for d in (0.5, 0.8) for s in LARGE],
    "breadcrumbs": [{"density": d, "scale": s} for d in (0.5, 0.9) for s in SMALL],
    "pcb": [{"density": d, "scale": s} for d in (0.1, 0.3) for s in SMALL],
    "model_stock": [{"scale": s} for s in SCALES],
    "sce": [{"density": d, "scale": s} for d in (0.2, 1.0) for s in LARGE],
    "karcher": [{}],
    "multislerp": [{}],
    "fisher": [{"floor": f, "normalize": n} for f in (1e-12, 1e-10, 1e-8, 1e-6) for n in (False, True)],
    "regmean": [{"alpha": a} for a in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0)],
    "opcm": [{"alpha": a, "scale": s} for a in (0.3, 0.5) for s in LARGE],
}
"""Settings that each method may try; scale multiplies the merged change."""
OPEN = {"search": [0, 1.2]}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy_soup": {"relative": True},
    "cma of task_arithmetic": {"budget": 40, "relative": True},
    "adamerging": {"budget": 40, "learning_rate": 0.02, "sequences": 4},
    "frank_wolfe": {"budget": 10},
}
"""Searches that choose by data, with what they may spend; they are measured where as many tasks are merged as :data:`SEARCHED`."""
SEARCHED = (2, 4, 6)
CLAIMS = {
    "ties": "better than task arithmetic (TIES, table 1)",
    "dare (ties)": "no worse than TIES (DARE, section 4)",
    "pcb": "better than TIES and task arithmetic (PCB-Merging, table 1)",
    "breadcrumbs": "holds as models are added, where task arithmetic falls (Model Breadcrumbs, figure 4)",
    "opcm": "better than continual task arithmetic and TIES, whatever the order (OPCM, table 1)",
    "adamerging": "better than task arithmetic and TIES (AdaMerging, table 1)",
    "frank_wolfe": "better than methods without data (FW-Merging, table 2)",
}


# text


def _share(name: str) -> str:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if number < 70 else "valid" if number < 85 else "test"


def _listings(source: str) -> str:
    out = io.StringIO()
    for constant in compile(source, "module", "exec").co_consts:
        if hasattr(constant, "co_code"):
            out.write(f"{constant.co_name}:\n")
            dis.dis(constant, file=out, depth=0)
            out.write("\n")
    return re.sub(r" at 0x[0-9a-f]+, file \"module\", line \d+", "", out.getvalue())


def _documentation(name: str, tree: ast.Module) -> str:
    """The docstrings as the entries of a reference manual in reStructuredText."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            what = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function"}[type(node)]
            title = name.removesuffix(".py").replace("/", ".") if isinstance(node, ast.Module) else node.name
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            found.append(f".. {what}:: {title}{arguments}\n\n" + textwrap.indent(text, "   "))
    return "\n\n".join(found)


def _trees(tree: ast.Module) -> str:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return "\n\n".join(text for f in functions if len(text := ast.dump(f, indent=1)) < 4000)


def documents(task: str) -> Iterator[tuple[str, str]]:
    """(file, text) of everything that a task's text is made of."""
    from espalier.bundled.corpus import HELD_OUT, source_files

    for name, path in source_files().items():
        if (name.split("/")[0] in HELD_OUT) and name.split("/")[0] != task:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if task in HELD_OUT:
            if name.split("/")[0] == task:
                yield name, source
            continue
        tree = ast.parse(source)
        text = {"bytecode": lambda s=source: _listings(s), "documentation": lambda n=name, t=tree: _documentation(n, t), "trees": lambda t=tree: _trees(t)}[task]()
        if len(text) > 500:
            yield name, text[:12000]


def write_text(folder: Path, most: int) -> None:
    """One folder of text files for each task and split: about so many bytes to train on, a fiftieth to choose by, a twentieth to measure on."""
    for task in TASKS:
        sizes = dict.fromkeys(("train", "valid", "test"), 0)
        ordered = sorted(documents(task), key=lambda pair: hashlib.sha256(pair[0].encode()).digest()[4:])
        for name, text in ordered:
            split = _share(name)
            if sizes[split] > most // {"train": 1, "valid": 50, "test": 20}[split]:
                continue
            text = text if split == "train" else text[:4000]
            sizes[split] += len(text)
            file = folder / task / split / (name.replace("/", "-") + ".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")


# measuring


class Judge:
    """The loss of models on every task's splits, in nats a token; one live model takes the weights of each."""

    def __init__(self, text: Path) -> None:
        from espalier.attach.load import load_model, load_tokenizer
        from espalier.data.encode import Encoder
        from espalier.data.sources import open_source
        from espalier.data.store import open_store

        self.model = load_model("seedling", "fp32", "cpu")
        encoder = Encoder(load_tokenizer("seedling"))
        self.stores = {
            (task, split): open_store(open_source(str(text / task / split)), encoder) for task in TASKS for split in ("valid", "test")
        }

    def losses(self, folder: Path, split: str, tasks: tuple[str, ...]) -> dict[str, float]:
        """Losses of the model in a folder."""
        import torch

        from espalier.checkpoint.safetensors_file import read_safetensors
        from espalier.evaluate.perplexity import score
        from espalier.memory.training_form import training_form

        tensors = read_safetensors(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[name])
        with training_form(self.model, chunk=1024, recompute=False, padded=False):
            return {task: score(self.model, self.stores[task, split], 512, 4096).loss for task in tasks}


# the experiment


def fine_tune(out: Path, text: Path, steps: int, threads: int) -> None:
    """One model for each task, and for Fisher and RegMean its statistics."""
    import espalier

    for task in TASKS:
        if not (out / "deltas" / task).exists():
            espalier.tune(
                "seedling", str(text / task / "train"), str(out / "deltas" / task), method="full", steps=steps, batch_size=8, sequence_length=256,
                learning_rate=5e-4, threads=threads, seed=0,
            )  # fmt: skip
        if not (out / "tuned" / task).exists():
            espalier.apply("seedling", [str(out / "deltas" / task)], str(out / "tuned" / task), dtype="fp32", quiet=True)
        if not (out / "statistics" / task).exists():
            (out / "statistics").mkdir(exist_ok=True)
            espalier.calibrate(
                str(out / "tuned" / task), str(text / task / "train"), str(out / "statistics" / task), "fisher,second_moment",
                tokens=16384, sequence_length=256, threads=threads, quiet=True,
            )  # fmt: skip


def merged(out: Path, tasks: tuple[str, ...], name: str, setting: dict[str, Any]) -> Path:
    """The model that a method makes of the fine-tunes of some tasks."""
    import espalier

    folder = out / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    options = dict(setting)
    method = name.split(" ")[0]
    if method in ("fisher", "regmean"):
        options["statistics"] = [str(out / "statistics" / task) for task in tasks]
    espalier.merge([str(out / "tuned" / task) for task in tasks], str(folder), method=method, model="seedling", quiet=True, dtype="fp32", **options)
    return folder


def searched(out: Path, tasks: tuple[str, ...], name: str, options: dict[str, Any], text: Path, threads: int) -> Path:
    """The model that a search on the valid split ends in."""
    import espalier

    folder = out / "searched"
    shutil.rmtree(folder, ignore_errors=True)
    strategy, _, method = name.partition(" of ")
    recipe: dict[str, Any] = {"model": "seedling", "dtype": "fp32", "method": method or "linear"}
    recipe["models"] = [{"path": str(out / "tuned" / task), **({"weight": OPEN} if method else {})} for task in tasks]
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    espalier.merge_search(
        [str(out / "recipe.yaml")], str(folder), [str(text / task / "valid") for task in tasks], strategy=strategy, threads=threads, quiet=True,
        **options,
    )  # fmt: skip
    return folder / "model"


def main() -> None:
    """Measure everything, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="2,3,4,5,6", help="how many tasks are merged")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--orders", type=int, default=4, help="orders in which OPCM takes the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see that it runs; nothing is published")
    a = parser.parse_args()
    import torch

    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    text = a.out / "text"
    if not text.exists():
        write_text(text, 50_000 if a.quick else 500_000)
    fine_tune(a.out, text, 20 if a.quick else a.steps, a.threads)
    judge, ledger = Judge(text), Ledger(a.out / "ledger.jsonl")
    from espalier.checkpoint.directory import resolve_model

    base = Path(resolve_model("seedling"))
    reference = {
        split: {
            "base": ledger.get(f"base {split}", lambda s=split: judge.losses(base, s, TASKS)),
            "tuned": {t: ledger.get(f"tuned {t} {split}", lambda t=t, s=split: judge.losses(a.out / "tuned" / t, s, (t,))[t]) for t in TASKS},
        }
        for split in ("valid", "test")
    }

    def recovery(losses: dict[str, float], split: str) -> dict[str, float]:
        ends = reference[split]
        return {t: (ends["base"][t] - loss) / (ends["base"][t] - ends["tuned"][t]) for t, loss in losses.items()}

    def measured(tasks: tuple[str, ...], name: str, setting: dict[str, Any], split: str) -> dict[str, float]:
        key = f"{split} {','.join(tasks)} {name} {json.dumps(setting, sort_keys=True)}"
        return recovery(ledger.get(key, lambda: judge.losses(merged(a.out, tasks, name, setting), split, tasks)), split)

    def best_of_search(tasks: tuple[str, ...], name: str, options: dict[str, Any]) -> dict[str, float]:
        key = f"test {','.join(tasks)} {name} {json.dumps(options, sort_keys=True)}"
        return recovery(ledger.get(key, lambda: judge.losses(searched(a.out, tasks, name, options, text, a.threads), "test", tasks)), "test")

    rows: list[dict[str, Any]] = []
    counts = [int(n) for n in a.tasks.split(",")]
    for count in counts:
        tasks = TASKS[:count]
        for name, grid in GRIDS.items():
            began = time.perf_counter()
            tried = [(statistics.mean(measured(tasks, name, setting, "valid").values()), i) for i, setting in enumerate(grid[: 2 if a.quick else None])]
            best = grid[max(tried)[1]]
            found = measured(tasks, name, best, "test")
            rows.append({
                "tasks": count, "method": name, "recovery": statistics.mean(found.values()), "worst task": min(found.values()),
                "by task": found, "setting": best, "tried": len(tried), "seconds": round(time.perf_counter() - began, 1),
            })  # fmt: skip
            print(count, name, f"{rows[-1]['recovery']:.3f}", best, file=sys.stderr, flush=True)
        for name, options in SEARCHES.items() if count in SEARCHED else ():
            began = time.perf_counter()
            options = {**options, "budget": 3} if a.quick else options
            found = best_of_search(tasks, name, options)
            rows.append({
                "tasks": count, "method": name, "recovery": statistics.mean(found.values()), "worst task": min(found.values()),
                "by task": found, "setting": options, "tried": options.get("budget", 2 * count), "seconds": round(time.perf_counter() - began, 1),
            })  # fmt: skip
            print(count, name, f"{rows[-1]['recovery']:.3f}", file=sys.stderr, flush=True)
    orders = []
    tasks = TASKS[: max(counts)]
    setting = next(row["setting"] for row in rows if row["method"] == "opcm" and row["tasks"] == len(tasks))
    for order in itertools.islice(itertools.permutations(tasks), 0, None, max(720 // a.orders, 1)):
        found = measured(order, "opcm", setting, "test")
        orders.append({"order": order, "recovery": statistics.mean(found.values()), "first": found[order[0]], "last": found[order[-1]]})
    report(a, reference, rows, orders, counts)


def report(a: argparse.Namespace, reference: dict[str, Any], rows: list[dict[str, Any]], orders: list[dict[str, Any]], counts: list[int]) -> None:
    """Print and publish."""
    by = {(row["method"], row["tasks"]): row["recovery"] for row in rows}
    names = sorted({row["method"] for row in rows if row["tasks"] == max(counts)}, key=lambda name: -by[name, max(counts)])
    print(table(["method", *[f"{n} tasks" for n in counts], "worst of all", "setting", "claim"], [
        [name, *[f"{by[name, n]:.3f}" if (name, n) in by else "" for n in counts],
         f"{next(r['worst task'] for r in rows if (r['method'], r['tasks']) == (name, max(counts))):.3f}",
         json.dumps(next(r["setting"] for r in rows if (r["method"], r["tasks"]) == (name, max(counts)))), CLAIMS.get(name, "")]
        for name in names
    ]))  # fmt: skip
    if orders:
        values = [o["recovery"] for o in orders]
        print(f"\nOPCM in {len(orders)} orders: {statistics.mean(values):.3f}, from {min(values):.3f} to {max(values):.3f}")
    if a.quick:
        return
    content = {"machine": machine(), "steps": a.steps, "effort": EFFORT, "losses": reference, "rows": rows, "opcm orders": orders, "claims": CLAIMS}
    write_result("merge_quality", content)
    plot(by, names, counts, RESULTS / "merge_quality.png")


def plot(by: dict[tuple[str, int], float], names: list[str], counts: list[int], path: Path) -> None:
    """Recovery against the number of models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    colors = plt.get_cmap("tab20").colors
    for number, name in enumerate(names):
        there = [n for n in counts if (name, n) in by]
        axes.plot(there, [by[name, n] for n in there], marker="o^sDvPX*"[number % 8], color=colors[number % 20], label=name, linewidth=1.4, markersize=5)
    axes.set_xticks(counts)
    axes.set_xlabel("models merged")
    axes.set_ylabel("recovered share of what fine-tuning gained (mean over tasks)")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, title=f"best at {max(counts)} first")
    axes.set_title("Merging fine-tunes of seedling", loc="left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
