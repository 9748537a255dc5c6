"""Write the pages of docs/methods, one per kind of method from the registry and one of measurements, and docs/choosing.md.

    python docs/build.py            # what `make docs` does
    python docs/build.py --check    # write nothing; exit code 1 when a page is not what it would write

Only the methods of the package itself are listed, so that an installed plugin changes no page. Nothing here imports torch:
the registry reads declarations from source. The page of measurements, ``compare.md``, is of what ``benchmarks/compare.py``,
``step_cost.py``, ``claims.py``, ``selections.py``, ``optim.py`` and ``optimizer_step.py`` have put into ``benchmarks/results``; without those there is none. ``docs/choosing.md`` says in a few rules what follows
from them, and what has not been measured.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from espalier import registry
from espalier.registry import Hyperparameter, MethodInfo

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "methods"
RESULTS = ROOT / "benchmarks" / "results"
TITLES = {
    "adapt": "Methods of `adapt/`: updates with tensors of their own",
    "branch": "Methods of `branch/`: small modules at named sites of the model",
    "select": "Methods of `select/`: some of the model's own numbers train",
    "optim": "Methods of `optim/`: optimizers",
    "compress": "Methods of `compress/`: smaller deltas",
    "merge": "Methods of `merge/`: several models into one",
    "search": "Methods of `search/`: how a merge is chosen by data",
}
"""Kind -> title of its page; any other kind that has methods gets a plain one."""
COMPARED = ("adapt", "select", "branch", "optim")
"""Kinds whose methods the benchmarks run against each other."""
OPTION_OF = {
    "adapter": "--method", "brancher": "--method", "optimizer": "--optimizer", "compressor": "--method", "merger": "--method",
    "searcher": "--strategy",
}  # fmt: skip
"""Role -> the option that chooses a method of it."""


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _row(h: Hyperparameter) -> str:
    type_ = h.type
    if type_.startswith("Literal["):
        type_ = type_.removeprefix("Literal[").removesuffix("]").replace("'", "").replace(", ", " or ")
    return f"| `--{h.name.replace('_', '-')}` | {_cell(type_)} | `{h.default}` | {_cell(h.help)} |"


def _docstring(info: MethodInfo) -> str:
    """The whole docstring of a method, from its source."""
    source = (ROOT / "src" / info.file).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == info.attribute:
            return (ast.get_docstring(node) or "").replace("``", "`")
    return ""


def section(info: MethodInfo) -> str:
    """What a page says of one method."""
    lines = [f"## {info.name}", "", _docstring(info), ""]
    lines.append(f"- paper: {info.paper or 'none'}")
    lines.append(f"- ids: {', '.join(f'#{i}' for i in info.ids) or 'none'}")
    lines.append(f"- file: [`src/{info.file}`](../../src/{info.file}), {info.lines} lines")
    if info.role in OPTION_OF:
        lines.append(f"- chosen by: `{OPTION_OF[info.role]} {info.name}`")
    lines += [f"- {name.replace('_', ' ')} by default: `{value}`" for name, value in info.settings.items()]
    if info.hyperparameters:
        lines += ["", "| option | type | default | help |", "| --- | --- | --- | --- |", *map(_row, info.hyperparameters)]
    else:
        lines += ["", "It has no options of its own."]
    return "\n".join(lines) + "\n"


def _results(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _machine(found: dict[str, Any]) -> str:
    """What it was measured on: the processor of most rows, and the rows of others."""
    where: dict[str, list[str]] = {}
    for row in found.get("rows", []):
        where.setdefault(row["processor"], []).append(row.get("method") or row["setting"])
    processors = sorted(where, key=lambda processor: -len(where[processor])) or [found["machine"]["processor"]]
    text = ", ".join([processors[0], *(f"{name} {found['machine'][name]}" for name in ("cores", "torch", "transformers", "peft") if name in found["machine"])])
    return text + "".join(f"; {', '.join(dict.fromkeys(where[other]))} on {other}" for other in processors[1:])


OF = {"ours": "Espalier", "peft": "PEFT"}
JOBS = {
    "package": "a package that seedling has not seen",
    "docstrings": "bodies of functions from their docstrings",
    "packages": "which package a docstring is from",
}


def _job(job: str, found: dict[str, Any]) -> str:
    """The table of one job of ``benchmarks/compare.py``, best first."""
    conditions = found["conditions"]
    rows = sorted((row for row in found["rows"] if "loss" in row), key=lambda row: row["loss"])
    text = f"## {JOBS[job].capitalize()}\n\n"
    text += f"{conditions['steps']} steps of {conditions['batch']} times {conditions['length']} tokens, mean of {len(conditions['seeds'])} seeds. "
    text += f"{_machine(found)}. " + (f"Loss before: {rows[0]['base loss']:.3f}.\n\n" if rows else "\n\n")
    if job == "package" and (RESULTS / "compare.png").exists():
        text += "![loss against bytes, with the Pareto front](../../benchmarks/results/compare.png)\n\n"
    costs = found.get("speed", {}).get("runs", {})
    if costs:
        text += f"Tokens a second and peaks are of short runs of each method on {found['speed']['machine']['processor']}, {found['speed']['threads']} threads.\n\n"

    def cost(row: dict[str, Any]) -> dict[str, Any] | None:
        return costs.get(f"{row['system']} {row['method']}")

    columns = ["method", "of", "loss", "accuracy", "forgetting", "trained", "KiB", "peak MiB", "tokens/s", "rate"]
    text += _table(columns, [
        [
            row["method"], OF[row["system"]], f"{row['loss']:.4f} ± {row['deviation']:.4f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}", "" if row["forgetting"] is None else f"{row['forgetting']:+.4f}",
            f"{row['trained']:,}", f"{row['bytes'] / 1024:,.1f}", f"{(cost(row) or row)['peak'] / 2**20:.0f}",
            f"{timed['tokens a second']:,.0f}" if (timed := cost(row)) else "",
            f"{row['rate']:.2g}" + (" (edge)" if row["edge"] else ""),
        ]
        for row in rows
    ])  # fmt: skip
    for row in found["rows"]:
        text += f"\nWithout a row: {row['method']} ({row['system']}): {row['refused']}\n" if "refused" in row else ""
    return text


def _cost(shape: str, found: dict[str, Any]) -> str:
    """The table of one shape of ``benchmarks/step_cost.py``, cheapest first."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    text = f"## A step on {shape.replace('m', ' M')} parameters\n\n"
    c = found["conditions"]
    text += f"{c['tokens']} tokens, base in {c['dtype']}, {c['threads']} threads, {c['rounds']} rounds. {_machine(found)}.\n\n"
    columns = ["setting", "trained", "times the floor", "PEFT's", "PEFT's over ours", "peak MiB", "PEFT's peak MiB"]
    return text + _table(columns, [
        [
            row["setting"], f"{row['trained']:,}", number(row["to floor"], 3), number(row["PEFT to floor"], 3), number(row["PEFT to ours"], 2),
            number(row["peak MiB"], 0), number(row["PEFT's peak MiB"], 0),
        ]
        for row in sorted(found["rows"], key=lambda row: row["to floor"])
    ])  # fmt: skip


def _selections(found: dict[str, Any]) -> list[str]:
    """The peaks and the sequences of packages of ``benchmarks/selections.py``."""
    parts = []
    if rows := [row for row in found.get("memory", {}).get("rows", []) if "peak" in row]:
        c = found["memory"]["conditions"]
        text = f"## Memory of selections\n\nPeaks of training a random Llama of {c['shape'].replace('m', ' M')} parameters in {c['dtype']}, {c['batch']} times {c['length']} tokens "
        text += f"at once, less what the imports took. {_machine(found['memory'])}.\n\n"
        if (RESULTS / "select.png").exists():
            text += "![loss against memory, and three packages in turn](../../benchmarks/results/select.png)\n\n"
        parts.append(text + _table(["method", "of", "trained", "peak MiB"], [
            [row["method"], OF[row["system"]], f"{row['trained']:,}", f"{row['peak'] / 2**20:.0f}"] for row in sorted(rows, key=lambda row: row["peak"])
        ]))  # fmt: skip
    if rows := [row for row in found.get("forgetting", {}).get("rows", []) if "losses" in row]:
        text = "## Three packages in turn\n\nasyncio, email and xml, each delta over those before. Learnt: what the held-out loss on a package falls by while it is learnt; "
        text += "forgotten: what the loss on the first two gains after their own training; own text: what the loss on seedling's own held-out text gains.\n\n"
        names = ("learnt", "forgetting", "own")
        parts.append(text + _table(["method", "learnt", "forgotten", "own text"], [
            [row["method"], *(f"{row[name]:+.4f} ± {row[f'{name} deviation']:.4f}" for name in names)] for row in rows
        ]))  # fmt: skip
    return parts


def _claims(found: dict[str, Any]) -> list[str]:
    """The verdicts of ``benchmarks/claims.py``."""
    if not found:
        return []
    text = f"## What the papers claim, and what shows here\n\nOn the first job above, {found['steps']} steps; the pass lines stood in `benchmarks/claims.py` before it was run. "
    text += "Better is a mean loss that is lower by more than the larger deviation over three seeds; numbers after \"of\" are those that train. " + _machine({"machine": found["machine"]}) + ".\n\n"
    return [text + _table(["claim", "pass line", "verdict", "figures"], [[c["says"], c["pass line"], c["verdict"], c["figures"]] for c in found["verdicts"]])]


def _optimizers(found: dict[str, Any]) -> list[str]:
    """The tables of ``benchmarks/optim.py`` and ``optimizer_step.py``."""
    parts, step = [], _results("optimizer_step")
    for shape in ("3m", "9m"):
        rows = sorted((row for row in found.get(shape, {}).get("rows", []) if "loss" in row), key=lambda row: row["loss"])
        if not rows:
            continue
        c = found[shape]["conditions"]
        text = f"## Optimizers, {rows[0]['trained'] / 1e6:.1f} M parameters\n\nA Llama over bytes, trained from nothing in {c['dtype']} for {c['steps']} steps of {c['batch']} times {c['length']} bytes, "
        text += f"mean of {len(c['seeds'])} seeds. {_machine(found[shape])}.\n\n"
        if shape == "3m" and (RESULTS / "optim.png").exists():
            text += "![loss against optimizer state and time of a step](../../benchmarks/results/optim.png)\n\n"
        text += _table(["optimizer", "loss (nats a byte)", "state MiB", "predicted MiB", "numbers", "rate"], [
            [
                row["setting"], f"{row['loss']:.4f} ± {row['deviation']:.4f}", f"{row['state bytes'] / 2**20:.2f}", f"{row['predicted'] / 2**20:.2f}",
                f"{row['trained']:,}", f"{row['rate']:.2g}" + (" (edge)" if row["edge"] else ""),
            ]
            for row in rows
        ])  # fmt: skip
        for row in found[shape]["rows"]:
            text += f"\nWithout a row: {row['setting']}: {row['refused']}\n" if "refused" in row else ""
        parts.append(text)
    if judged := found.get("papers"):
        text = "## What the papers say of optimizers, and what shows here\n\nOf the losses on the smaller model. \"As\" is within 2 %; a difference counts that is larger than the deviation over seeds.\n\n"
        parts.append(text + _table(["paper", "says that the loss of", "is", "that of", "difference here", "shows here"], [
            [j["paper"], j["of"], j["says"], j["than"], f"{j['difference']:+.4f} ± {j['deviation']:.4f}", "yes" if j["shows"] else "no"] for j in judged
        ]))  # fmt: skip
    if step and parts:
        text = f"## Optimizers: the time of a step\n\nOn 17 M parameters in float32, {step['tokens']:,} tokens, {step['threads']} thread(s), in processor time: how much longer a whole training step takes than "
        text += f"with fused AdamW, on average, new subspaces averaged in, and the slowest; the first step, which allocates, apart. Of `benchmarks/optimizer_step.py`. {_machine({'machine': step['machine']})}.\n\n"
        parts.append(text + _table(["optimizer", "ms a step of it", "slowest", "first", "whole step, mean", "whole step, slowest"], step["rows"]))
    return parts


# -- which one should I use


def _said(row: dict[str, Any], name: str, more: str = "") -> str:
    return f"**{row[name]}** (loss {row['loss']:.4f} ± {row['deviation']:.4f}{more})"


def _tied(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best, and those that are no worse by more than the larger deviation over seeds, best first."""
    best = min(rows, key=lambda row: row["loss"])
    return sorted((row for row in rows if row["loss"] - best["loss"] <= max(row["deviation"], best["deviation"])), key=lambda row: row["loss"])


def _front(rows: list[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Those that no other beats in both loss and cost, cheapest first."""
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], row["loss"])):
        if not kept or row["loss"] < kept[-1]["loss"]:
            kept.append(row)
    return kept


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _rules_for_deltas() -> list[str]:
    """Which method adapts, by the job ``package`` of ``benchmarks/compare.py``."""
    job = _results("compare").get("package", {})
    rows = [row for row in job.get("rows", []) if row["system"] == "ours" and "loss" in row]
    if not rows:
        return ["Not measured yet: `python benchmarks/compare.py`.", ""]
    kinds = {info.name: info.kind for info in registry.methods()}
    base, lines = rows[0]["base loss"], []
    best = _tied(rows)
    lines.append(f"- The lowest loss, whatever it costs: {_said(best[0], 'method', f', from {base:.4f}')}." + (
        f" No worse beyond the deviation over seeds: {', '.join(row['method'] for row in best[1:])}." if best[1:] else ""
    ))  # fmt: skip
    front = _front(rows, "bytes")
    most = base - best[0]["loss"]
    if most <= 0:
        return ["No method has gained anything.", ""]
    enough = next(row for row in front if base - row["loss"] >= 0.9 * most)
    share = (base - enough["loss"]) / most
    if enough["bytes"] < best[0]["bytes"]:
        lines.append(f"- A small delta: {_said(enough, 'method')} has {share:.0%} of the best one's gain in {_size(enough['bytes'])}; the best has {_size(best[0]['bytes'])}.")
    smallest = front[0]
    lines.append(f"- The smallest delta on the front: {_said(smallest, 'method')}, {_size(smallest['bytes'])}, {(base - smallest['loss']) / most:.0%} of the best one's gain.")
    kept = [row for row in rows if row["forgetting"] is not None and base - row["loss"] >= 0.9 * most]
    if kept:
        least = min(kept, key=lambda row: row["forgetting"])
        lines.append(f"- What forgets least among those with nine tenths of the best one's gain: {_said(least, 'method')}, {least['forgetting']:+.4f} on seedling's own text.")
        steps = {row["setting"]: row["to floor"] for row in _results("step_cost").get("70m", {}).get("rows", [])}
        if timed := [row for row in kept if row["method"] in steps]:
            fast = min(timed, key=lambda row: steps[row["method"]])
            lines.append(f"- The cheapest step among these, on 70 M parameters: {_said(fast, 'method')}, {steps[fast['method']]:.2f} times that of a frozen model.")
    for kind, what in (("adapt", "an update with tensors of its own"), ("select", "some of the model's own numbers"), ("branch", "a module beside the layers")):
        if of := [row for row in rows if kinds.get(row["method"]) == kind]:
            lines.append(f"- If it has to be {what}: {_said(min(of, key=lambda row: row['loss']), 'method')}.")
    defaults = {info.name: info.settings.get("learning_rate") for info in registry.methods()}
    if times := [row["rate"] / float(default) for row in rows if (default := defaults.get(row["method"]))]:
        lines.append(
            f"- The learning rate: the best here is {statistics.median(times):.3g} times the default in the median ({min(times):.2g} to {max(times):.3g} times)"
            "; defaults are those of papers, whose models are far larger. On a small model, try higher ones."
        )
    lines += ["", "Best for its size, smallest first:", ""]
    lines.append(_table(["method", "loss", "delta", "trained"], [
        [row["method"], f"{row['loss']:.4f} ± {row['deviation']:.4f}", _size(row["bytes"]), f"{row['trained']:,}"] for row in front
    ]))  # fmt: skip
    if edge := [row["method"] for row in rows if row["edge"]]:
        lines += [f"Measured at the edge of the grid of learning rates, so perhaps better than shown: {', '.join(edge)}.", ""]
    return lines


def _rules_for_memory() -> list[str]:
    """Which method or selection takes least memory, and which forgets least in a sequence."""
    found = _results("select")
    rows = sorted((row for row in found.get("memory", {}).get("rows", []) if "peak" in row), key=lambda row: row["peak"])
    lines = []
    if not rows:
        lines.append("- The memory of selections is not measured yet: `python benchmarks/selections.py --parts memory`.")
    ours = [row for row in rows if row["system"] == "ours"]
    theirs = next((row for row in rows if (row["system"], row["method"]) == ("peft", "lora")), None)
    if ours:
        lines.append(f"- Least memory: **{ours[0]['method']}**, {ours[0]['peak'] / 2**20:.0f} MiB above the imports on {found['memory']['conditions']['shape'].replace('m', ' M')} parameters.")
    if theirs:
        for name in ("s2ft", "paca", "lisa", "hft", "full"):
            if row := next((row for row in ours if row["method"] == name), None):
                lines.append(f"- {name}: {row['peak'] / 2**20:.0f} MiB, {row['peak'] / theirs['peak']:.2f} of the {theirs['peak'] / 2**20:.0f} MiB of PEFT's LoRA.")
    sequence = {row["method"]: row for row in found.get("forgetting", {}).get("rows", []) if "losses" in row}
    if {"full", "hft"} <= sequence.keys():
        full, half = sequence["full"], sequence["hft"]
        spread = max(full["forgetting deviation"], half["forgetting deviation"])
        gap = full["forgetting"] - half["forgetting"]
        verdict = "less than" if gap > spread else "more than" if gap < -spread else "no less and no more, beyond the deviation over seeds, than"
        lines.append(
            f"- One task after another: HFT forgets {verdict} full tuning ({half['forgetting']:+.4f} against {full['forgetting']:+.4f}, ± {spread:.4f}), "
            f"and learns {half['learnt']:.4f} against {full['learnt']:.4f}."
        )
    else:
        lines.append("- Forgetting over a sequence of tasks is not measured yet: `python benchmarks/selections.py --parts forgetting`.")
    return [*lines, ""]


def _rules_for_optimizers() -> list[str]:
    """Which optimizer, by ``benchmarks/optim.py``, and ``optimizer_step.py`` for the time."""
    found = _results("optim")
    rows = [row for row in found.get("3m", {}).get("rows", []) if "loss" in row]
    if not rows:
        return ["Not measured yet: `python benchmarks/optim.py`.", ""]
    step = _results("optimizer_step")
    times = {name.replace(" fp32", "").replace(" ", "-"): over for name, *_, over, _ in step.get("rows", [])}

    def cost(row: dict[str, Any]) -> str:
        time = f", a step {times[row['setting']]}" if row["setting"] in times else ""
        return f", {_size(row['state bytes'])} of state{time}"

    best = _tied(rows)
    lines = [f"- The lowest loss: {_said(best[0], 'setting', cost(best[0]))}." + (
        f" No worse beyond the deviation over seeds: {', '.join(row['setting'] for row in best[1:])}." if best[1:] else ""
    )]  # fmt: skip
    near = [row for row in rows if row["loss"] <= 1.02 * best[0]["loss"]]
    least = min(near, key=lambda row: row["state bytes"])
    lines.append(f"- Least state within 2 % of the lowest loss: {_said(least, 'setting', cost(least))}.")
    least = min(rows, key=lambda row: row["state bytes"])
    lines.append(f"- Least state of all: {_said(least, 'setting', cost(least))}.")
    if slow := [f"{name} {over}" for name, over in times.items() if float(over.rstrip("%")) > 10]:
        lines.append(f"- Steps of {step['tokens']:,} tokens that take over 10 % longer than AdamW's: {', '.join(slow)}.")
    elif not times:
        lines.append("- The time of a step is not measured yet: `python benchmarks/optimizer_step.py`.")
    if larger := sorted((row for row in found.get("9m", {}).get("rows", []) if "loss" in row), key=lambda row: row["loss"]):
        lines.append(f"- On three times as many parameters, best first: {', '.join(_said(row, 'setting', cost(row)) for row in larger)}.")
    else:
        lines.append("- Not measured yet on more parameters: `python benchmarks/optim.py --shape 9m`.")
    if judged := found.get("papers"):
        shows = sum(j["shows"] for j in judged)
        lines.append(f"- Of {len(judged)} orderings that papers report of these, {shows} show here: [the table](methods/compare.md#what-the-papers-say-of-optimizers-and-what-shows-here).")
    return [*lines, "", "Best for its state, least first:", "", _table(["optimizer", "loss (nats a byte)", "state"], [
        [row["setting"], f"{row['loss']:.4f} ± {row['deviation']:.4f}", _size(row["state bytes"])] for row in _front(rows, "state bytes")
    ])]  # fmt: skip


def _unmeasured() -> list[str]:
    """What of the registry, and in general, no benchmark has a figure of."""
    done = {row["method"] for row in _results("compare").get("package", {}).get("rows", []) if "loss" in row}
    tried = {row["setting"].removesuffix("-8bit") for row in _results("optim").get("3m", {}).get("rows", []) if "loss" in row}
    own = [info for info in registry.methods() if info.file.startswith("espalier/")]
    lines = []
    if missing := [info.name for info in own if info.kind in ("adapt", "select", "branch") and info.name not in done]:
        lines.append(f"- Methods without a loss: {', '.join(missing)}.")
    if missing := [info.name for info in own if info.kind == "optim" and info.name not in tried]:
        lines.append(f"- Optimizers without a loss: {', '.join(missing)}.")
    return [
        *lines,
        "- Models beyond 9 million parameters by loss, and beyond 350 million by time and memory; GPUs; text that is not Python source; several processes.",
        "- Other options than the defaults, but for the learning rate, which is chosen for each from a small grid and on a third of the steps, so for what is fast at first; other numbers of steps.",
        "",
    ]


def choosing(tables: bool) -> str:
    """The page ``docs/choosing.md``; ``tables``: whether there is a page of them to lead to."""
    lines = [
        "# Which one should I use?", "",
        "This page is written by `make docs` from the results of the benchmarks; do not edit it. Its rules follow from the tables, which are of small models "
        "on two cores: take them as where to begin, and compare on your own data. A difference counts where it is larger than the larger standard deviation "
        "over three seeds." + (" All figures: [methods/compare.md](methods/compare.md)." if tables else ""), "",
        "## Which method adapts", "", *_rules_for_deltas(),
        "## When memory, or what was learnt before, matters most", "", *_rules_for_memory(),
        "## Which optimizer", "", *_rules_for_optimizers(),
        "## What was not measured", "", *_unmeasured(),
        "The methods and all their options: [methods.md](methods.md); optimizers: [optimizers.md](optimizers.md).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def measurements() -> str:
    """The page of measurements; "" where there are none."""
    parts = [_job(job, found) for job, found in _results("compare").items() if "conditions" in found]
    parts += [_cost(shape, found) for shape, found in _results("step_cost").items()]
    parts += _claims(_results("claims"))
    parts += _selections(_results("select"))
    parts += _optimizers(_results("optim"))
    if not parts:
        return ""
    head = "# How the methods compare\n\nThis page is written by `make docs` from the results of `benchmarks/compare.py`, `step_cost.py`, `claims.py`, `selections.py`, `optim.py` and `optimizer_step.py`, "
    head += "which say what each column is and run it again; do not edit it.\n\n"
    return head + "\n".join(parts)


def pages() -> dict[Path, str]:
    """Every page: its file and its text."""
    own = [info for info in registry.methods() if info.file.startswith("espalier/")]
    measured = measurements()
    made = {ROOT / "docs" / "choosing.md": choosing(bool(measured))} | ({FOLDER / "compare.md": measured} if measured else {})
    for kind in dict.fromkeys(info.kind for info in own):
        found = [info for info in own if info.kind == kind]
        head = f"# {TITLES.get(kind, f'Methods of `{kind}/`')}\n\n"
        head += "This page is written by `make docs` from the source of the methods; do not edit it.\n\n"
        lines = sorted({info.file: info.lines for info in found}.values())
        together = {info.file: info.lines for info in own if info.kind in COMPARED}
        head += f"{len(found)} methods in {len(lines)} files of {lines[0]} to {lines[-1]} lines, the median {statistics.median_low(lines)}"
        head += f"; of the {len(together)} files of {', '.join(COMPARED)} together {statistics.median_low(together.values())}.\n\n" if kind in COMPARED else ".\n\n"
        head += "How they compare on one job, and what a step of each costs: [compare.md](compare.md).\n\n" if kind in COMPARED and measured else ""
        head += "".join(f"- [{info.name}](#{info.name}): {info.summary.replace('``', '`')}\n" for info in found)
        made[FOLDER / f"{kind}.md"] = head + "\n" + "\n".join(map(section, found))
    return made


def differences() -> list[str]:
    """The pages on disk that are not what would be written, and those that would not be written at all."""
    wanted = pages()
    found = []
    for page, text in wanted.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            found.append(f"{page.relative_to(ROOT)} is not up to date")
    found += [f"{page.relative_to(ROOT)} is of no kind of method" for page in sorted(FOLDER.glob("*.md")) if page not in wanted]
    return found


def main() -> int:
    """Write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page differs")
    if parser.parse_args().check:
        found = differences()
        for line in found:
            print(f"{line}; run `make docs`", file=sys.stderr)
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for page, text in wanted.items():
        page.write_text(text, encoding="utf-8")
    for page in FOLDER.glob("*.md"):
        if page not in wanted:
            page.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
