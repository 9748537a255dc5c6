"""Write the pages of docs/methods: one per kind of method from the registry, and one of measurements.

    python docs/build.py            # what `make docs` does
    python docs/build.py --check    # write nothing; exit code 1 when a page is not what it would write

Only the methods of the package itself are listed, so that an installed plugin changes no page. Nothing here imports torch:
the registry reads declarations from source. The page of measurements, ``compare.md``, is of what ``benchmarks/compare.py`` and
``benchmarks/step_cost.py`` have put into ``benchmarks/results``; without those there is none.
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
COMPARED = ("adapt", "select", "branch")
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
    return ", ".join(f"{name} {found[name]}" for name in ("processor", "cores", "torch", "transformers", "peft") if name in found)


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
    text += f"{_machine(found['machine'])}. " + (f"Loss before: {rows[0]['base loss']:.3f}.\n\n" if rows else "\n\n")
    if job == "package" and (RESULTS / "compare.png").exists():
        text += "![loss against bytes, with the Pareto front](../../benchmarks/results/compare.png)\n\n"
    speeds = found.get("speed", {}).get("tokens a second", {})
    columns = ["method", "of", "loss", "accuracy", "forgetting", "trained", "KiB", "peak MiB", "tokens/s", "rate"]
    text += _table(columns, [
        [
            row["method"], {"ours": "Espalier", "peft": "PEFT"}[row["system"]], f"{row['loss']:.4f} ± {row['deviation']:.4f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}", "" if row["forgetting"] is None else f"{row['forgetting']:+.4f}",
            f"{row['trained']:,}", f"{row['bytes'] / 1024:,.1f}", f"{row['peak'] / 2**20:.0f}",
            f"{speed:,.0f}" if (speed := speeds.get(f"{row['system']} {row['method']}")) else "",
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
    text += f"{found['tokens']} tokens, base in {found['dtype']}, {found['threads']} threads, {found['rounds']} rounds. {_machine(found['machine'])}.\n\n"
    columns = ["setting", "trained", "times the floor", "PEFT's", "PEFT's over ours", "peak MiB", "PEFT's peak MiB"]
    return text + _table(columns, [
        [
            row["setting"], f"{row['trained']:,}", number(row["to floor"], 3), number(row["PEFT to floor"], 3), number(row["PEFT to ours"], 2),
            number(row["peak MiB"], 0), number(row["PEFT's peak MiB"], 0),
        ]
        for row in sorted(found["rows"], key=lambda row: row["to floor"])
    ])  # fmt: skip


def measurements() -> str:
    """The page of measurements; "" where there are none."""
    parts = [_job(job, found) for job, found in _results("compare").items() if "conditions" in found]
    parts += [_cost(shape, found) for shape, found in _results("step_cost").items()]
    if not parts:
        return ""
    head = "# How the methods compare\n\nThis page is written by `make docs` from the results of `benchmarks/compare.py` and `benchmarks/step_cost.py`, "
    head += "which say what each column is and run it again; do not edit it.\n\n"
    return head + "\n".join(parts)


def pages() -> dict[Path, str]:
    """Every page: its file and its text."""
    own = [info for info in registry.methods() if info.file.startswith("espalier/")]
    measured = measurements()
    made = {FOLDER / "compare.md": measured} if measured else {}
    for kind in dict.fromkeys(info.kind for info in own):
        found = [info for info in own if info.kind == kind]
        head = f"# {TITLES.get(kind, f'Methods of `{kind}/`')}\n\n"
        head += "This page is written by `make docs` from the source of the methods; do not edit it.\n\n"
        lines = sorted({info.file: info.lines for info in found}.values())
        head += f"{len(found)} methods in {len(lines)} files of {lines[0]} to {lines[-1]} lines, the median {statistics.median_low(lines)}.\n\n"
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
