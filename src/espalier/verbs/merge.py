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
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    shard_size: str | None = None,
    any_base: bool = False,
    threads: int | None = None,
    seed: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Combine models, or deltas of one base, into one model; none of them is ever in memory.

    Args:
        models: directories of models or deltas, hub ids; or one recipe, a YAML file
        out: directory of the new model
        method: how (see `espalier methods --kind merge`)
        model: the base: what changes are changes of, and whose files the new model gets; default: the one that a delta names
        weights: one of each model, such as 0.5,0.3,0.2; default: 1
        scale: of the merged change; default: 1
        dtype: stores every floating point tensor so; default: as the base, or else the first model
        shard_size: cut the weights into files of at most this size, such as 5GB; default: as the base or first model
        any_base: accept deltas that were made for another base
        threads: CPU threads
        seed: of what is random; default: 0
        quiet: print nothing but the result
        options: the method's options

    Returns:
        `out`, `method`, `models`, `tensors` merged and `copied`, `bytes`, `seconds` by phase.

    Raises:
        EspalierError: for models that do not fit each other, a damaged file, too little disk, or anything wrong with an option.
    """
    import sys
    import time
    from pathlib import Path

    import torch

    from espalier import registry
    from espalier.checkpoint.atomic import atomic_directory, refuse_existing, require_free_space
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.exchange import merge_recipe, merging
    from espalier.exchange.composition import cut
    from espalier.exchange.recipe import write_side_files
    from espalier.memory.meter import format_bytes, parse_bytes

    display = Display(quiet)
    target = Path(out)
    refuse_existing(target)
    if threads is not None:
        at_least("threads", threads, 1)
        torch.set_num_threads(threads)
    began = time.perf_counter()
    given = {"model": model, "scale": scale, "dtype": dtype, "seed": seed, "method": method, "any_base": any_base or None}
    content: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        recipe = merge_recipe.Recipe.read(Path(models[0]))
        content = {**recipe.model_dump(), **content, "options": {**recipe.options, **options}}
        if weights is not None:
            raise EspalierError("the recipe says the weights of its models; --weights is for models on the command line")
    else:
        if method is None:
            raise EspalierError(f"merge needs a method: --method {', '.join(i.name for i in registry.methods() if i.role == 'merger')}")
        if weights is not None and len(weights) != len(models):
            raise EspalierError(f"there are {len(weights)} weights and {len(models)} models")
        content["models"] = [{"path": path, "weight": weights[i] if weights else None} for i, path in enumerate(models)]
        content["options"] = options
    recipe = merge_recipe.Recipe.of(content, models[0] if len(models) == 1 else "the command line")
    function, recipe.options = registry.options_of(recipe.method, "merger", recipe.options)
    info = registry.find(recipe.method, "merger")
    first_pass = getattr(sys.modules[function.__module__], info.settings["first_pass"]) if "first_pass" in info.settings else None
    like, base, members = merge_recipe.members(recipe)
    items = merge_recipe.items(recipe, like, base, members)
    files = cut({item.name: item for item in items}, like, parse_bytes(shard_size) if shard_size else None)
    total = sum(item.nbytes for item in items)
    opened = time.perf_counter()
    with atomic_directory(target) as temporary:
        require_free_space(temporary, total + (8 << 20), f"the new model in {target}")
        with display.bar("merging", max(total >> 20, 1), "MiB") as update:
            method_ = merging.Method(function, first_pass)
            merging.write_merged(items, files, method_, recipe.seed, temporary, lambda done: update(done >> 20))
        merged = time.perf_counter()
        write_side_files(temporary, like, [], [], {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}.get(str(recipe.dtype)))
        merge_recipe.write_lineage(temporary, recipe, like, shard_size)
    seconds = {"open": opened - began, "merge": merged - opened, "finish": time.perf_counter() - merged}
    count = sum(item.is_merged for item in items)
    display.note(
        f"{count} tensors of {len(members)} models merged by {recipe.method} in {sum(seconds.values()):.1f} s; "
        f"the model is in {target} ({format_bytes(total)})"
    )
    return {
        "out": str(target),
        "method": recipe.method,
        "models": [i.path for i in recipe.models],
        "tensors": count,
        "copied": len(items) - count,
        "bytes": total,
        "seconds": seconds,
    }
