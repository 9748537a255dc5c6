"""What is told of a trained seedling: ``RESULTS.md``, ``curve.csv`` and ``curve.png``, from its run's record and figures."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

EVERY = 20
"""Steps between rows of the curve; its training loss is the mean of as many."""

Figures = Mapping[str, Any]


class RunRecord:
    """A training run read back from its folder: ``run.json``, ``metrics.jsonl``, a ``state.json``, ``result.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resolved: dict[str, Any] = json.loads((folder / "run.json").read_text())["resolved"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.steps = [line for line in lines if "loss" in line]
        self.measured: dict[int, dict[str, Any]] = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
        result = folder / "result.json"
        if result.exists():
            last = json.loads(result.read_text())["evaluation"]
            self.measured[self.steps[-1]["step"]] = {name: scores["after"] for name, scores in last.items()}
        states = sorted((folder / "checkpoints").glob("step-*/state.json")) or [folder / "state.json"]
        self.environment: dict[str, Any] = json.loads(states[-1].read_text())["environment"]

    @property
    def hours(self) -> float:
        return sum(step["seconds"] for step in self.steps) / 3600

    @property
    def tokens(self) -> int:
        return sum(step["tokens"] for step in self.steps)

    def rows(self) -> list[dict[str, Any]]:
        """The curve: every ``EVERY`` steps, at every measurement and at the end."""
        wanted = {*self.measured, self.steps[-1]["step"]}
        result, tokens = [], 0
        for index, step in enumerate(self.steps):
            tokens += step["tokens"]
            if step["step"] % EVERY and step["step"] not in wanted:
                continue
            recent = self.steps[max(0, index + 1 - EVERY) : index + 1]
            row: dict[str, Any] = {
                "step": step["step"], "tokens": tokens, "train_loss": sum(s["loss"] for s in recent) / len(recent)
            }  # fmt: skip
            scores = self.measured.get(step["step"], {})
            for name in self.names():
                row[name] = scores[name]["bits_per_byte"] if name in scores else None
            result.append(row)
        return result

    def names(self) -> list[str]:
        """The data sets that were measured during the run."""
        return list(dict.fromkeys(name for scores in self.measured.values() for name in scores))


def pooled(scores: list[Mapping[str, Any]]) -> float:
    """Bits per byte over the bytes of several data sets together."""
    return sum(s["bits_per_byte"] * s["bytes"] for s in scores) / sum(s["bytes"] for s in scores)


def curve_csv(run: RunRecord) -> str:
    """The curve as CSV; columns of data sets are in bits per byte, empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "tokens", "train_loss", *run.names()], lineterminator="\n")
    writer.writeheader()
    for row in run.rows():
        writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def curve_png(run: RunRecord, figures: Figures, path: Path) -> None:
    """The curve as a picture: training loss, and bits per byte with the baseline that the bar is set by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = run.rows()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=100, layout="constrained")
    left.plot([r["tokens"] / 1e6 for r in rows], [r["train_loss"] for r in rows], color="black", linewidth=1)
    left.set(xlabel="million tokens", ylabel="nats per token", title=f"training loss, mean of {EVERY} steps")
    for name in run.names():
        points = [(r["tokens"] / 1e6, r[name]) for r in rows if r[name] is not None]
        right.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=name)
    baseline = figures["bits_per_byte"]["held-out"]["kneser_ney"]
    right.axhline(baseline, color="grey", linestyle="--", linewidth=1, label="5-gram Kneser-Ney, held-out")
    bar = baseline * (1 - figures["bars"]["bits_per_byte"]["least"])
    right.axhline(bar, color="grey", linestyle=":", linewidth=1, label="the bar")
    right.set(xlabel="million tokens", ylabel="bits per byte", title="held-out text", xlim=(0, None), ylim=(None, 1.6 * baseline))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _training(run: RunRecord, corpus: int) -> str:
    done, wanted, where = run.steps[-1]["step"], run.resolved["steps"], run.environment
    early = "" if done == wanted else f" **An early checkpoint**: step {done:,} of {wanted:,}, before the learning rate has decayed."
    recipe = {k: v for k, v in run.resolved.items() if v is not None and k not in ("out", "resume", "quiet")}
    return (
        f"{done:,} steps, {run.tokens:,} tokens ({run.tokens / corpus:.1f} passes), {run.hours:.2f} hours at "
        f"{run.tokens / run.hours / 3600:,.0f} tokens/s.{early}\n\n"
        f"Machine: {_processor()} ({where['processor']}), {os.cpu_count()} cores, of which {where['threads']} trained. "
        f"Python {where['python']}, torch {where['torch']}, transformers {where['transformers']}.\n\n"
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n\n![loss](curve.png)\n\nThe numbers behind it: `curve.csv`.\n"
    )


def results_markdown(run: RunRecord | None, figures: Figures) -> str:
    """The whole of ``RESULTS.md``."""
    sizes = [[f"`{name}`", f"{s['files']:,}", f"{s['bytes']:,}", f"{s['tokens']:,}"] for name, s in figures["splits"].items()]
    scores = []
    for name, s in figures["bits_per_byte"].items():
        values = [f"{s[key]:.4f}" for key in ("model", "kneser_ney", "modified_kneser_ney")]
        label = "**asyncio, email and xml together**" if name == "held-out" else f"`{name}`"
        scores.append([label, *values, f"{1 - s['model'] / s['kneser_ney']:.1%}"])
    syntax, n = figures["syntax"], figures["syntax"]["samples"]
    accepted = [
        [rule, f"{s['model']} of {n}", f"{s['file']} of {n}", f"{s['ratio']:.2f}" if s["ratio"] is not None else "-"]
        for rule, s in (("as `seedling/syntax.py` says (the bar's)", syntax["running"]), ("`textwrap.dedent`", syntax["textwrap"]))
    ]
    bars = "\n".join(f"- {line}" for line in bar_lines(figures))
    how = f"temperature {syntax['temperature']}, top-p {syntax['top_p']}"
    return (
        "# seedling: what was trained and how well it does\n\n"
        "Written by `seedling/build.py`; `make seedling` does it all again.\n\n"
        f"{figures['parameters']:,} parameters, stored in bf16; SHA-256 of `model.safetensors`: `{figures['sha256'][:16]}...`\n\n"
        f"## The bars\n\n{bars}\n\n"
        "## Bits per byte\n\n"
        f"{_table(['data', 'seedling', '5-gram Kneser-Ney', 'modified Kneser-Ney', 'under Kneser-Ney'], scores)}\n"
        f"Every byte and the end of every file is predicted; windows of {figures['sequence_length']:,} tokens overlap by "
        "half. The Kneser-Ney models (`seedling/kneser_ney.py`) are trained on the same tokens of `stdlib:train`.\n\n"
        "## Completions that parse\n\n"
        f"{_table(['dedented by', 'seedling', 'the files', 'ratio'], accepted)}\n"
        f"{n} places in the held-out packages, {syntax['tokens']} tokens from each, {how}.\n\n"
        "## The split\n\n"
        f"{_table(['data', 'files', 'bytes', 'tokens'], sizes)}\n"
        "Hashes of all files: `src/espalier/bundled/stdlib.json`.\n\n"
        f"## Training\n\n{_training(run, figures['splits']['stdlib:train']['tokens']) if run else 'No record of a run lies beside this model.' + chr(10)}"
    )


def bar_lines(figures: Figures) -> list[str]:
    """One line per bar."""
    first, second = figures["bars"]["bits_per_byte"], figures["bars"]["syntax"]
    counts = figures["syntax"]["running"]
    n = figures["syntax"]["samples"]
    under = f"{abs(first['value']):.1%} {'under' if first['value'] >= 0 else 'OVER'}"
    aim = "reached" if first["value"] >= first["aim"] else "not reached"
    ratio = f"{second['value']:.2f}" if second["value"] is not None else "no"
    return [
        f"{_verdict(first)}: bits per byte on the held-out packages {figures['bits_per_byte']['held-out']['model']:.4f}, "
        f"{under} 5-gram Kneser-Ney ({figures['bits_per_byte']['held-out']['kneser_ney']:.4f}); "
        f"the bar is {first['least']:.0%}, the aim of {first['aim']:.0%} is {aim}",
        f"{_verdict(second)}: completions that parse {counts['model']} of {n}, the files' own {counts['file']} of {n}: "
        f"{ratio} of their share; the bar is {second['least']}",
    ]


def _verdict(bar: Mapping[str, Any]) -> str:
    return "PASS" if bar["met"] else "FAIL"
