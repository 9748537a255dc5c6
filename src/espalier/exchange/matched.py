"""What `merge match` writes: the delta that permutes B, the permuted B, or the partial merge of A and B."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.structure import logical_tensors
from espalier.calibrate.pair import Text, moments
from espalier.checkpoint.atomic import require_free_space
from espalier.checkpoint.directory import ModelDirectory
from espalier.delta import store
from espalier.delta.forms import Replace
from espalier.errors import EspalierError
from espalier.exchange import composition, pleas
from espalier.exchange import recipe as recipes
from espalier.exchange.matching import Match, delta_of
from espalier.exchange.materialize import write_model


def permutation(model: Any, found: Match, directory: ModelDirectory, names: tuple[str, str], options: Mapping[str, Any]) -> store.Delta:
    """The exact delta that makes P B of B: ``Permute``, and all values of tensors whose experts moved."""
    updates, layouts = delta_of(model, found.reordered)
    stored = {directory.info(name).dtype for name in directory}
    if "F64" in stored and any(update.form == "replace" for update in updates.values()):
        raise EspalierError(f"{directory.path} has tensors of float64 and experts that move; store it in float32 first")
    if stored == {"BF16"}:  # the numbers that are stored whole take no more room than in the model
        updates = {name: Replace(u.values.bfloat16()) if isinstance(u, Replace) else u for name, u in updates.items()}
    manifest = {
        "method": "match",
        "hyperparameters": dict(options),
        "base": {"name": recipes.recorded(names[1]), "fingerprint": directory.fingerprint(), "model_type": model.config.model_type},
        "training": {"matched with": names[0]},
    }
    return store.Delta(updates, layouts, manifest)


def _card(title: str, base: str, how: str) -> str:
    return f"---\nlibrary_name: espalier\nbase_model: {base}\ntags: [espalier, merge]\n---\n\n# {title}\n\n{how}\n"


def write_delta(folder: Path, delta: store.Delta, names: tuple[str, str]) -> None:
    """Write the delta of B that lines it up with A."""
    how = f"Written by `espalier merge match {names[0]} {names[1]}`. It only permutes: the model computes what it did.\n\n    espalier apply --model {names[1]} --delta . --out PERMUTED"
    store.save(folder, delta, _card(f"{names[1]}, its units in the order of {names[0]}'s", names[1], how))


def write_permuted(folder: Path, out: Path, delta: store.Delta, directory: ModelDirectory, names: tuple[str, str]) -> None:
    """Write the permuted B, with B's bits, files and cut."""
    seen, deltas = composition.seen_by(directory, [delta])
    made = composition.outputs(seen, deltas)
    require_free_space(folder, sum(output.nbytes for output in made.values()) + (8 << 20), f"the new model in {out}")
    write_model(seen, made, deltas, 1.0, folder, lambda done: None)
    recipes.write_side_files(folder, directory, [], [], None)
    how = f"Written by `espalier merge match {names[0]} {names[1]} --to model`. It computes what {names[1]} does."
    (folder / "README.md").write_text(_card(f"{names[1]}, its units in the order of {names[0]}'s", names[1], how), encoding="utf-8")


@torch.no_grad()
def merged(
    a: Any, b: Any, found: Match, sizes: pleas.Sizes, batches: Text | None, ridge: float,
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[Any, dict[str, pleas.Fit]]:  # fmt: skip
    """The partial merge of A and the permuted B, in float32.

    Args:
        a, b: live models; B as :func:`~espalier.exchange.matching.match` left it.
        found: what that found.
        sizes: of :func:`espalier.exchange.pleas.widths` or :func:`~espalier.exchange.pleas.budgeted`.
        batches: what linear layers are fitted on; without it the blocks are merged as they are.
        ridge: of the least squares.
        progress: called with the number of inputs that are done.

    Returns:
        The model, and the errors of each fitted layer.

    Raises:
        EspalierError: when the config cannot say these sizes, or a layer cannot be fitted.
    """
    made = type(a)(pleas.config_of(a, sizes)).float().eval()
    where = pleas.axes(a, made, found.similarity)
    one, other, target = (logical_tensors(model) for model in (a, b, made))
    for name, tensor in target.items():
        tensor.copy_(pleas.blocks(one[name], other[name], where[name]))
    fits: dict[str, pleas.Fit] = {}
    if batches is not None:
        by_path: dict[str, list[pleas.Layer]] = {}
        for layer in pleas.layers(a):
            by_path.setdefault(layer.path, []).append(layer)
        widths = {path: one[layers[0].weight].shape[1] for path, layers in by_path.items()}
        for group in moments(a, b, widths, batches, progress=progress):
            for path, sums in group.items():
                for layer in by_path[path]:
                    biases = (one[layer.bias], other[layer.bias]) if layer.bias else None
                    rows, columns = where[layer.weight]
                    try:
                        weight, bias, fit = pleas.fit((one[layer.weight], other[layer.weight]), biases, (rows, columns), sums, ridge)
                    except EspalierError as error:
                        raise EspalierError(f"{layer.weight}: {error}") from error
                    target[layer.weight].copy_(weight)
                    if layer.bias and bias is not None:
                        target[layer.bias].copy_(bias)
                    fits[layer.weight] = fit
    return made, fits


def write_merged(folder: Path, out: Path, model: Any, directory: ModelDirectory, dtype: torch.dtype, names: tuple[str, str]) -> None:
    """Write the partial merge as an ordinary checkpoint in ``dtype``, with A's tokenizer and other files."""
    model = model.to(dtype)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    require_free_space(folder, nbytes + (8 << 20), f"the new model in {out}")
    model.save_pretrained(folder)
    for name, content in directory.side_files().items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(content, folder / name)
    how = f"Written by `espalier merge match {names[0]} {names[1]}` (PLeaS, arXiv:2407.02447)."
    (folder / "README.md").write_text(_card(f"{names[0]} and {names[1]}, partly merged", names[0], how), encoding="utf-8")
