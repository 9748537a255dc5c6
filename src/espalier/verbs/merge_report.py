"""Merge report: what stands in the way of a merge, before it is made."""

from __future__ import annotations

from typing import Any, Literal


def merge_report(
    models: list[str],
    *,
    model: str | None = None,
    data: list[str] | None = None,
    density: float = 0.2,
    rank: int = 16,
    points: int = 11,
    out: str | None = None,
    vocabulary: Literal["base", "union"] | None = None,
    any_base: bool = False,
    sequence_length: int | None = None,
    micro_batch_size: int = 8,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """How models, or deltas of one base, relate: norms, sign conflicts, overlap, subspaces, and the loss between them.

    Args:
        models: directories of models or deltas, hub ids; at least two
        model: the base: what changes are changes of; default: the one that a delta names
        data: measures the loss along the lines between models on it; may be given several times
        density: share of each tensor's entries that are its largest changes
        rank: of the leading singular subspaces; 0 leaves them out
        points: along each line, the ends among them
        out: directory for report.json, report.md and plots; must not exist yet
        vocabulary: where tokenizers differ, compare by token: those of the base, or of all models; default: refuse
        any_base: accept deltas that were made for another base
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        micro_batch_size: sequences that run at a time
        device: where the loss is measured, such as cpu or cuda; default: cuda where there is one
        dtype: what the loss is computed in; default: as stored
        threads: CPU threads
        quiet: print nothing but the result

    Returns:
        `notes` (what the numbers say), `models`, `pairs` and `lines` with every statistic, in total, by role, block and tensor.

    Raises:
        EspalierError: for models that do not fit each other, a damaged file, data that is not there, or a bad option.
    """
    import contextlib
    import json
    import math
    from pathlib import Path

    import torch

    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.display import Display, json_of
    from espalier.errors import EspalierError, at_least
    from espalier.exchange import merge_line, merge_plan, merge_plots, merge_recipe, merge_statistics
    from espalier.exchange import merge_report as reports
    from espalier.exchange.live_merge import Live
    from espalier.verbs._validation import losses_of

    display = Display(quiet)
    models = [models] if isinstance(models, str) else [str(path) for path in models]
    data = [data] if isinstance(data, str) else list(data or ())
    if len(models) < 2:
        raise EspalierError(f"a report is of two models or more, to be compared; there is {len(models)}")
    if not 0 < density <= 1:
        raise EspalierError(f"density is {density}; it must be above 0, and at most 1")
    at_least("rank", rank, 0)
    at_least("points", points, 2)
    if threads is not None:
        at_least("threads", threads, 1)
        torch.set_num_threads(threads)
    if out is not None:
        refuse_existing(Path(out))
    content: dict[str, Any] = {"method": "linear", "models": [{"path": path} for path in models], "any_base": any_base}
    content |= {key: str(value) for key, value in (("model", model), ("vocabulary", vocabulary)) if value is not None}
    recipe = merge_recipe.Recipe.of(content, "the command line")
    opened = merge_plan.opened(recipe)
    items, _ = merge_plan.items(recipe, opened)

    with contextlib.ExitStack() as stack:
        load = losses_of(
            stack, str(opened.like.path), data, sequence_length=sequence_length, micro_batch_size=micro_batch_size, device=device,
            dtype=dtype, display=display,
        ) if data else None  # fmt: skip
        total = sum(math.prod(item.shape) for item in items if item.is_merged)
        with display.bar("comparing", max(total >> 20, 1), "Mi numbers") as update:
            found = merge_statistics.gone_through(items, density, rank, lambda done: update(done >> 20))
        report = reports.assembled(models, opened.base_name, items, found, density, rank)
        if load is not None:
            live, losses = load()
            between = Live(live, items)
            pairs = merge_line.every_pair(len(models), opened.base is not None)
            with display.bar("measuring", merge_line.measured_points(pairs, points), "points") as update:
                reports.add_lines(report, merge_line.along(between, items, pairs, points, losses, update))
        reports.judged(report)
    if out is not None:
        with atomic_directory(Path(out)) as folder:
            plots = []
            if merge_plots.is_there():
                plots = [f"plots/{name}" for name in merge_plots.write(report, folder / "plots")]
            else:
                display.warn("no plots: they need matplotlib; pip install 'espalier[plot]'")
            (folder / "report.json").write_text(json.dumps(json_of(report), indent=1) + "\n", encoding="utf-8")
            (folder / "report.md").write_text(reports.page(report, plots), encoding="utf-8")
        display.note(f"the report is in {out}")
    return report
