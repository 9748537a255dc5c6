"""The report of a merge search: what was tried, what won, and against what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.checkpoint.atomic import atomic_file, write_text
from espalier.display import Display
from espalier.verbs._merge_problem import MergeProblem, Trial


def write_report(
    folder: Path, problem: MergeProblem, winner: Trial, selected: Mapping[str, float], alone: Mapping[str, Mapping[str, float]],
    single: tuple[str, Mapping[str, float]], *, strategy: str, options: Mapping[str, Any], data: Sequence[str], select: Sequence[str], budget: int,
    display: Display,
) -> None:  # fmt: skip
    """Write ``report.md``, and ``best.png`` where matplotlib is installed."""
    columns = [*data, *select]
    rows = [("**the winner**", [winner.loss, *(winner.losses[name] for name in data), *(selected.get(name) for name in select)])]
    for path, losses in alone.items():
        found = single[1] if path == single[0] else {}
        rows.append((f"`{path}` alone", [problem.objective(losses), *(losses[name] for name in data), *(found.get(name) for name in select)]))
    lines = [
        "# A search for a merge", "",
        f"Strategy `{strategy}`{''.join(f', {k} {v}' for k, v in options.items())}: {len(problem.trials)} candidates tried of a budget of {budget}.",
        f"The winner is trial {winner.number} ({winner.about}), with {winner.loss:.6g}. `espalier merge recipe.yaml --out DIR` makes it again.", "",
        "What was minimized, and losses in nats per token:", "",
        f"| model | minimized | {' | '.join(f'{name} (selection)' if name in select else name for name in columns)} |",
        f"| --- |{' --- |' * (len(columns) + 1)}",
    ]  # fmt: skip
    lines += [f"| {name} | {' | '.join('' if value is None else f'{value:.4f}' for value in values)} |" for name, values in rows]
    if not select:
        lines += ["", "The winner was chosen by the same data as are shown here; its loss on other text may be higher (`--select`)."]
    if problem.genes:
        lines += ["", "| what was open | the winner has |", "| --- | --- |"]
        lines += [f"| `{gene.name}` | {_text(problem.space.value(winner.recipe, gene))} |" for gene in problem.genes]
    if problem.notes:
        lines += ["", *(f"- {note}" for note in problem.notes)]
    best = list(itertools.accumulate((trial.loss for trial in problem.trials), min))
    lines += ["", "| trial | loss | about |", "| --- | --- | --- |"]
    steps = [t for t, least in zip(problem.trials, best, strict=True) if t.number == 1 or least < best[t.number - 2]]
    lines += [f"| {trial.number} | {trial.loss:.6g} | {trial.about} |" for trial in steps]
    lines += ["", "Every trial that was better than all before it; all are in `trials.jsonl`."]
    if _plot(folder / "best.png", [trial.loss for trial in problem.trials], best, min(problem.alone(i) for i in range(problem.models))):
        lines += ["", "![the lowest loss so far](best.png)"]
    else:
        display.note("no plot: matplotlib is not installed (pip install 'espalier[plot]')")
    write_text(folder / "report.md", "\n".join(lines) + "\n")


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plot(file: Path, losses: Sequence[float], best: Sequence[float], single: float) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    finite = [(number, loss) for number, loss in enumerate(losses, 1) if math.isfinite(loss)]
    axes.plot(*zip(*finite, strict=True), ".", color="0.7", label="candidates")
    axes.step(range(1, len(best) + 1), best, where="post", label="lowest so far")
    axes.axhline(single, linestyle="--", color="tab:red", label="best single model")
    axes.set(xlabel="candidate", ylabel="what is minimized")
    axes.legend()
    figure.tight_layout()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    return True
