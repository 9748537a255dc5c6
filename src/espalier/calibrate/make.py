"""From a model, data and a request to a calibration: found in the cache, or made, or gone on with."""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from espalier.anatomy.parameters import select
from espalier.calibrate.footprint import BATCH
from espalier.calibrate.stages import Run, work_folder
from espalier.calibrate.statistics import STATISTICS
from espalier.calibrate.store import FORMAT, Calibration, Request, expected, find, write
from espalier.calibrate.walk import Walker
from espalier.calibrate.watch import is_watched, places
from espalier.checkpoint.atomic import require_free_space
from espalier.checkpoint.directory import ModelDirectory
from espalier.data.batches import Order, Window
from espalier.data.store import TokenStore
from espalier.memory.meter import format_bytes


def choose_windows(store: TokenStore, sequence_length: int, tokens: int, seed: int) -> list[Window]:
    """The sequences of a calibration: windows drawn by seed until ``tokens`` inputs are reached (0: all), longest first.

    Each is inside one document. One that would exceed the limit ends the drawing; there is always one.
    """
    order = Order(store, sequence_length, seed)
    chosen: list[Window] = []
    total = 0
    for position in range(order.count(0)):
        window = order.window(0, position)
        if tokens and chosen and total + len(window) > tokens:
            break
        chosen.append(window)
        total += len(window)
    return sorted(chosen, key=len, reverse=True)


def _facts(run: Run, targets: list[Any], sources: dict[str, Any]) -> dict[str, Any]:
    """The metadata; ``sources`` becomes tensor name -> the stage's file."""
    coverage: dict[str, list[int]] = {}
    loss, predictions = 0.0, 0
    for file, facts in run.results():
        sources.update(dict.fromkeys(file.tensors, file))
        coverage.update(facts.get("coverage", {}))
        loss, predictions = loss + facts.get("loss", 0.0), predictions + facts.get("predictions", 0)
    asked = {STATISTICS[name].kind: name for name in run.request.want}
    return {
        "format": FORMAT,
        "request": asdict(run.request),
        "model_type": run.walker.model.config.model_type,
        "sequences": len(run.windows),
        "tokens": sum(map(len, run.windows)),
        "predictions": predictions,
        "loss": loss / predictions if run.backwards and predictions else None,
        "places": {
            kind: {name: shape for name, shape in there.items() if f"{name}:{asked[kind]}" in sources}
            for kind, there in places(run.walker, targets).items()
            if kind in asked
        },
        "sites": {target.name: target.site for target in targets if is_watched(target) and target.site in coverage},
        "coverage": coverage,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
    }


def _require_space(run: Run, targets: list[Any]) -> None:
    facts = {"request": asdict(run.request), "places": places(run.walker, targets), "sequences": len(run.windows)}
    statistics = sum(8 * math.prod(shape) for shape in expected(facts).values())
    states = run.states("hidden", 0).nbytes * (len(run.walker.blocks) + 3 if run.backwards else 2)
    # the stages' files and the one that is made of them are there at the same time
    require_free_space(run.folder, 2 * statistics + states, f"this calibration ({format_bytes(statistics)} of statistics)")


def make(
    directory: ModelDirectory,
    store: TokenStore,
    request: Request,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int = BATCH,
    bar: Callable[[int], Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration that is asked for, and how it came about.

    Args:
        directory, store: the model and the tokens that the request names.
        dtype, device: to compute in; the dtype is the request's.
        batch_size: sequences whose rows wait for one addition; moves sums by their rounding in float64 only.
        bar: given a total, a context of a progress bar.
        note: told what the user should know.

    Returns:
        The open calibration in the cache (which may hold more than was asked for), and ``cached``, ``resumed_at`` (the
        stage, or ``None``) and ``resident`` (the most bytes of parameters in memory at once; ``None`` when cached).

    Raises:
        EspalierError: when the model cannot be walked, a target matches nothing, or the disk is too small.
        NotFiniteError: naming the block after which a hidden state is NaN or infinite.
    """
    if found := find(request):
        return found, {"cached": True, "resumed_at": None, "resident": None}
    walker = Walker(directory, dtype, device)
    targets = select(walker.targets, request.targets)
    windows = choose_windows(store, request.sequence_length, request.tokens, request.seed)
    final = request.folder() / f"{request.name()}.safetensors"
    with work_folder(final.with_suffix(".work")) as folder:
        run = Run(walker, store, windows, request, targets, folder, batch_size)
        _require_space(run, targets)
        with bar(len(windows) * len(run.stages())) if bar else contextlib.nullcontext(lambda done, stage: None) as update:
            run.progress = lambda done, stage: update(done, stage=stage)
            resumed = run.run()
        sources: dict[str, Any] = {}
        facts = _facts(run, targets, sources)
        write(final, facts, {name: sources[name] for name in expected(facts)})
        shutil.rmtree(folder)
    if resumed:
        note(f"an earlier run of this request was gone on with, from its stage {resumed}")
    return Calibration(final), {"cached": False, "resumed_at": resumed, "resident": walker.most_resident}
