"""Merge: several models into one, in slices, at the speed of the disk."""

from __future__ import annotations

from typing import Any, Literal


def merge(
    models: list[str],
    out: str,
    *,
    method: str | None = None,
    model: str | None = None,
    weights: list[float] | None = None,
    scale: float | None = None,
    vocabulary: Literal["base", "union"] | None = None,
    to: Literal["model", "delta"] | None = None,
    space: Literal["updates", "factors", "svd"] | None = None,
    rank: int | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    shard_size: str | None = None,
    any_base: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    seed: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Combine models, or deltas of one base, into one model; none of them is ever in memory.

    Args:
        models: directories of models or deltas, hub ids; or one recipe, a YAML file of Espalier or of mergekit
        out: directory of the new model
        method: how (see `espalier methods --kind merge`)
        model: the base: what changes are changes of, and whose files the new model gets; default: the one that a delta names
        weights: one of each model, such as 0.5,0.3,0.2; default: 1
        scale: of the merged change; default: 1
        vocabulary: where tokenizers differ, the new model has the tokens of the base, or of all models; default: refuse
        to: write a model, or the delta that makes it of the base (of deltas that a method adds up, in their own forms); default: model
        space: of deltas merged into a delta: updates (default), the mean of their factors, or any method in a shared basis (svd)
        rank: of deltas merged into a delta: cut every matrix to the best update of this rank
        dtype: stores every floating point tensor so; default: as the base, or else the first model
        shard_size: cut the weights into files of at most this size, such as 5GB; default: as the base or first model
        any_base: accept deltas that were made for another base
        device: where the arithmetic is done, such as cuda
        threads: CPU threads
        seed: of what is random; default: 0
        quiet: print nothing but the result
        options: the method's options

    Returns:
        `out`, `method`, `models`, `base`, `tensors` merged and `copied`, `bytes`, `seconds` by phase; where deltas were merged
        as deltas also `space`, `rank`, `error` (the relative error of all of them, null where the base would be needed to know
        it) and `updates` (for each its forms, bytes and relative error).

    Raises:
        EspalierError: for models that do not fit each other, a damaged file, too little disk, or anything wrong with an option.
    """
    import time
    from pathlib import Path

    import torch

    from espalier import registry
    from espalier.attach.device import pick_device
    from espalier.checkpoint.atomic import atomic_directory, refuse_existing, require_free_space
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.exchange import merge_deltas, merge_plan, merge_recipe, mergekit_recipe, merging
    from espalier.exchange.composition import cut
    from espalier.memory.meter import format_bytes, parse_bytes

    display = Display(quiet)
    target = Path(out)
    refuse_existing(target)
    if threads is not None:
        at_least("threads", threads, 1)
        torch.set_num_threads(threads)
    began, on = time.perf_counter(), pick_device(device)
    models = [models] if isinstance(models, str) else [str(path) for path in models]
    where = "the command line"
    content: dict[str, Any] = {}
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        where = models[0]
        if weights is not None:
            raise EspalierError(f"{where} says the weights of its models; --weights is for models on the command line")
        content = mergekit_recipe.read(where)
    else:
        if method is None:
            names = ", ".join(info.name for info in registry.methods() if info.role == "merger")
            raise EspalierError(f"merge needs a method: --method {names}")
        if weights is not None and len(weights) != len(models):
            raise EspalierError(f"there are {len(weights)} weights and {len(models)} models")
        content["models"] = [{"path": path, "weight": weights[i] if weights else None} for i, path in enumerate(models)]
    given = {"model": model, "scale": scale, "dtype": dtype, "seed": seed, "method": method, "any_base": any_base or None}
    given |= {"vocabulary": vocabulary, "to": to, "shard_size": shard_size, "space": space, "rank": rank}
    content |= {key: str(value) if key == "model" else value for key, value in given.items() if value is not None}
    recipe = merge_recipe.Recipe.of(content, where)
    function, own = merge_recipe.given_options(recipe.method, options)
    recipe.options |= own
    info = registry.find(recipe.method, "merger")
    how = merging.Method.of(info, function)
    if recipe.space or recipe.rank is not None or (recipe.to == "delta" and merge_deltas.is_of_deltas(recipe)):
        try:
            as_deltas = merge_deltas.plan(recipe, how)
        except EspalierError as reason:
            if recipe.space or recipe.rank is not None:
                raise
            display.note(f"the merged model is compared with the base, number by number, as the deltas cannot be merged as deltas: {reason}")
        else:
            if on.type != "cpu":
                display.note(f"deltas are merged as deltas on the CPU; --device {device} is of models")
            return _of_deltas(as_deltas, recipe, info, target, began, display)
    shard_bytes = parse_bytes(recipe.shard_size) if recipe.shard_size else None
    opened = merge_plan.opened(recipe)
    if recipe.to == "delta" and opened.base is None:
        raise EspalierError("a delta needs the model that it is a change of: --model BASE")
    items, alignment = merge_plan.items(recipe, opened)
    if recipe.stack is None and (apart := merge_plan.trained_apart(items)) is not None:
        display.warn(
            f"{apart[0]} and {apart[1]} were trained apart (the cosine of their weights is {apart[2]:.3f}); what is merged coordinate by "
            "coordinate will be of no use. Line them up first: espalier merge match"
        )
    like = opened.like.directory
    if shard_bytes is None and recipe.stack is not None and len(like.files()) > 1:
        shard_bytes = max((like.path / file).stat().st_size for file in like.files())
    files = cut({item.name: item for item in items}, like, shard_bytes)
    total = sum(item.nbytes for item in items)
    planned = time.perf_counter()

    def write(folder: Path) -> None:
        require_free_space(folder, total + (8 << 20), f"the new model in {target}")
        with display.bar("merging", max(total >> 20, 1), "MiB") as update:
            merging.write_merged(items, files, how, recipe.seed, folder, lambda done: update(done >> 20), on)
        merge_plan.write_beside(folder, recipe, opened, items, alignment)

    with atomic_directory(target) as temporary:
        if recipe.to == "delta":
            merge_plan.write_as_delta(temporary, opened, write)
        else:
            write(temporary)
            (temporary / "README.md").write_text(merge_recipe.card(recipe, info, opened.base_name), encoding="utf-8")
        (temporary / "merge.yaml").write_text(merge_recipe.as_yaml(recipe, info), encoding="utf-8")
        merged = time.perf_counter()
    seconds = {"open": planned - began, "merge": merged - planned, "finish": time.perf_counter() - merged}
    nbytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    count = sum(item.is_merged for item in items)
    display.note(
        f"{count} tensors of {len(opened.members)} models merged by {recipe.method} in {sum(seconds.values()):.1f} s; "
        f"the {recipe.to} is in {target} ({format_bytes(nbytes)})"
    )
    return {
        "out": str(target),
        "method": recipe.method,
        "models": [i.path for i in recipe.models],
        "base": opened.base_name,
        "tensors": count,
        "copied": len(items) - count,
        "bytes": nbytes,
        "seconds": seconds,
    }


def _of_deltas(merge: Any, recipe: Any, info: Any, target: Any, began: float, display: Any) -> dict[str, Any]:
    """Deltas into a delta, as deltas."""
    import time

    from espalier.checkpoint.atomic import atomic_directory
    from espalier.delta.store import TENSORS
    from espalier.exchange import merge_recipe
    from espalier.memory.meter import format_bytes
    from espalier.verbs._outcomes import show_worst

    planned = time.perf_counter()
    with atomic_directory(target) as temporary:
        with display.bar("merging", len(merge.layouts), "parameters") as update:
            outcomes, error = merge.write(temporary, update)
        (temporary / "merge.yaml").write_text(merge_recipe.as_yaml(recipe, info), encoding="utf-8")
        merged = time.perf_counter()
    seconds = {"open": planned - began, "merge": merged - planned, "finish": time.perf_counter() - merged}
    show_worst(outcomes, display)
    if merge.space == "factors":
        known = "is not known without the base" if error is None else f"makes {error:.2%} of the whole"
        display.warn(f"the mean of factors is not the mean of what they make; the difference (their cross terms) {known}")
    elif error:
        display.note(f"all of them together lose {error:.2%}")
    nbytes = (target / TENSORS).stat().st_size
    display.note(f"{len(outcomes)} updates of {len(merge.deltas)} deltas merged by {recipe.method}; the delta is in {target} ({format_bytes(nbytes)})")
    return {
        "out": str(target),
        "method": recipe.method,
        "models": [i.path for i in recipe.models],
        "base": merge.manifest.get("base", {}).get("name"),
        "tensors": len(outcomes),
        "copied": 0,
        "bytes": nbytes,
        "seconds": seconds,
        "space": merge.space,
        "rank": merge.rank,
        "error": error,
        "updates": [outcome.as_json() for outcome in outcomes],
    }
