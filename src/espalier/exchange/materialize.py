"""A base and deltas into a new model directory, tensor by tensor; imports neither transformers nor peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import Piece, locate
from espalier.checkpoint.directory import INDEX, ModelDirectory
from espalier.checkpoint.safetensors_file import SafetensorsWriter
from espalier.delta.forms import Update, working_dtype
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError


def _chains(deltas: Sequence[Delta]) -> dict[str, tuple[Layout, list[Update]]]:
    """Parameter -> its layout and its updates, innermost first."""
    chains: dict[str, tuple[Layout, list[Update]]] = {}
    for delta in deltas:
        for name, update in delta.updates.items():
            chains.setdefault(name, (delta.layouts[name], []))[1].append(update)
    return chains


def _updated(weight: torch.Tensor, layout: Layout, updates: Sequence[Update], scale: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """The stored matrix under its updates, rounded once, and what the rounding did."""
    logical = weight.transpose(-1, -2) if layout.transposed else weight
    exact = before = logical.to(working_dtype(logical))
    for update in updates:
        if tuple(update.shape) != tuple(logical.shape):
            raise EspalierError(f"the update is for shape {tuple(update.shape)}, the base has {tuple(logical.shape)}")
        scaled = update.with_tensors({})
        scaled.gain = update.gain if scale == 1.0 else update.gain * scale
        exact = scaled.apply(exact)
    rounded = exact.to(weight.dtype)
    error = (rounded.to(exact.dtype) - exact).abs()
    moved = torch.linalg.vector_norm(exact - before)
    facts = {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "rounding": float((error / exact.abs().clamp_min(torch.finfo(exact.dtype).tiny)).max()) if error.numel() else 0.0,
        "lost": float(torch.linalg.vector_norm(error) / moved) if moved > 0 else 0.0,
    }
    return (rounded.transpose(-1, -2) if layout.transposed else rounded).contiguous(), facts


def write_model(
    directory: ModelDirectory, deltas: Sequence[Delta], scale: float, out: Path, progress: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    """Write the updated model's files into ``out``: the base's shards and side files, changed tensors replaced.

    Returns:
        What rounding did, by parameter (the worst expert's for fused ones).
    """
    chains = _chains(deltas)
    plans: dict[str, list[tuple[Piece, Layout, list[Update], str]]] = {}
    taken: dict[str, str] = {}
    for name, (layout, updates) in chains.items():
        experts = updates[0].shape[0] if len(updates[0].shape) == 3 else None
        pieces = locate(name, layout.names, experts, directory)
        split = [update.unbind() for update in updates] if experts and pieces[0].expert is not None else None
        for piece in pieces:
            for part in piece.names:
                if part in taken:
                    raise EspalierError(f"the deltas update {taken[part]!r} and {name!r}, which are one tensor of the base: {part}")
                taken[part] = name
            own = updates if split is None or piece.expert is None else [u[piece.expert] for u in split]
            plan = (piece, layout if piece.expert is None else Layout(), own, name)
            plans.setdefault(directory.file_of[piece.names[0]], []).append(plan)
    writers = {
        file: SafetensorsWriter(
            out / file,
            {n: (i.dtype, i.shape) for n, i in directory.file(file).tensors.items() if directory.file_of.get(n) == file},
            {k: v for k, v in directory.file(file).metadata.items() if k != "format"},
        )
        for file in directory.files()
    }
    report: dict[str, dict[str, Any]] = {}
    done: set[str] = set()
    for file in directory.files():
        for piece, layout, updates, name in plans.get(file, ()):
            parts = [directory.read(part) for part in piece.names]
            try:
                new, facts = _updated(torch.cat(parts) if len(parts) > 1 else parts[0], layout, updates, scale)
            except EspalierError as error:
                raise EspalierError(f"{name}: {error}") from error
            for part, tensor in zip(piece.names, new.split([len(p) for p in parts]) if len(parts) > 1 else [new], strict=True):
                writers[directory.file_of[part]].write(part, tensor)
                done.add(part)
            if name not in report or facts["lost"] > report[name]["lost"]:
                report[name] = {"name": name, **facts}
            progress(len(done))
    for name in directory:
        if name not in done:
            writers[directory.file_of[name]].write(name, directory.read(name))
            done.add(name)
            progress(len(done))
    for writer in writers.values():
        writer.close()
    for side in directory.side_files():
        shutil.copyfile(side, out / side.name)
    if (directory.path / INDEX).exists():
        shutil.copyfile(directory.path / INDEX, out / INDEX)
    return report


def write_card(out: Path, directory: ModelDirectory, folders: Sequence[str], deltas: Sequence[Delta], scale: float) -> None:
    """A model card that says where the model comes from."""
    lineage = "\n".join(
        f"- `{folder}`: {delta.manifest.get('method')} {json.dumps(delta.manifest.get('hyperparameters', {}))}, "
        f"data `{delta.manifest.get('training', {}).get('data')}`"
        for folder, delta in zip(folders, deltas, strict=True)
    )
    base = deltas[0].manifest.get("base", {})
    text = (
        f"---\nlibrary_name: transformers\nbase_model: {base.get('name')}\ntags: [espalier]\n---\n\n# {base.get('name')} with deltas\n\n"
        f"Written by `espalier apply` (scale {scale}) from `{directory.path}`, fingerprint `{base.get('fingerprint')}`, and:\n\n{lineage}\n"
    )
    (out / "README.md").write_text(text, encoding="utf-8")
