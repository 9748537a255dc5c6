"""Compress: a delta into a smaller one."""

from __future__ import annotations

from typing import Any


def compress(
    delta: str,
    out: str,
    *,
    method: str,
    model: str | None = None,
    data: list[str] | None = None,
    sequence_length: int | None = None,
    micro_batch_size: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Make a delta smaller by a compression method; the result is an ordinary delta.

    Args:
        delta: directory of the delta
        out: directory of the smaller delta
        method: how (see `espalier methods --kind compress`)
        model: the base; default: the one that the delta names, where it is on this machine (with --data, or on the hub)
        data: validation data that choose among the method's candidates (compeft: its alpha); may be given several times
        sequence_length: of validation: longest context, in tokens; default: 512, or all positions of a model with fewer
        micro_batch_size: of validation: sequences that run at a time; default: 8
        device: of validation: such as cpu or cuda; default: cuda where there is one
        threads: CPU threads
        seed: of what is random
        quiet: print nothing but the result
        options: the method's options

    Returns:
        `out`, `method`, `hyperparameters` (those really used), `bytes_before` and `bytes` of the tensors' files, `ratio`, `tried`
        (candidates and their losses), and `tensors`: for each its forms, bytes and the relative error (Frobenius norms;
        null where the base would be needed to know it).

    Raises:
        EspalierError: for a damaged delta, an update that the method cannot compress, or anything wrong with an option.
    """
    import dataclasses
    from contextlib import ExitStack
    from pathlib import Path

    import torch

    from espalier import registry
    from espalier.checkpoint.atomic import atomic_directory, refuse_existing
    from espalier.delta import compression, store
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.exchange import conversion
    from espalier.memory.meter import format_bytes
    from espalier.verbs._outcomes import show_worst

    display = Display(quiet)
    folder, target = Path(delta), Path(out)
    refuse_existing(target)
    of_validation = {"sequence_length": sequence_length, "micro_batch_size": micro_batch_size, "device": device}
    for option, value in of_validation.items():
        if value is not None and not data:
            raise EspalierError(f"{option} is of validation and does nothing without --data; leave it out, or give --data")
    made = registry.make(method, "compressor", **options)
    if threads is not None:
        at_least("threads", threads, 1)
        torch.set_num_threads(threads)
    loaded = store.load(folder, mapped=True)
    base = model or (str(loaded.manifest.get("base", {}).get("name", "")) if data else "")
    if data and not base:
        raise EspalierError(f"{folder} does not name its base; pass --model DIR")
    weights = conversion.base_of(loaded, folder, base or None)
    whole = compression.Whole(loaded, seed, weights)
    tried: list[dict[str, Any]] = []
    if data:
        with ExitStack() as stack:
            loss = _validation(stack, base, data, sequence_length, 8 if micro_batch_size is None else micro_batch_size, device, display)
            made, tried = compression.choose(made, whole, loss)
    hyperparameters = dataclasses.asdict(made)
    with atomic_directory(target) as temporary:
        spool = conversion.Spool(temporary / "spool")
        with display.bar("compressing", len(loaded.updates), "parameters") as update:
            updates, outcomes = compression.compress(made, whole, spool, update)
        manifest = conversion.manifest_after(loaded, method, {**hyperparameters, "seed": seed}, outcomes)
        smaller = store.Delta(updates, {name: loaded.layouts[name] for name in updates}, manifest)
        size = conversion.write(folder, temporary, smaller, f"Compressed by `{method}`.")
        spool.remove()
    before = (folder / store.TENSORS).stat().st_size
    for trial in tried:
        display.note(", ".join(f"{key} {value:.6g}" for key, value in trial.items()))
    show_worst(outcomes, display)
    display.note(f"{format_bytes(before)} became {format_bytes(size)} ({before / size:.1f} times smaller); the delta is in {target}")
    return {
        "out": str(target),
        "method": method,
        "hyperparameters": hyperparameters,
        "bytes_before": before,
        "bytes": size,
        "ratio": before / size,
        "tried": tried,
        "tensors": [outcome.as_json() for outcome in outcomes],
    }


def _validation(stack: Any, base: str, data: list[str], length: int | None, micro_batch_size: int, device: str | None, display: Any) -> Any:
    from espalier.verbs._validation import validation_loss

    paths = [data] if isinstance(data, str) else data
    return validation_loss(
        stack, base, paths, sequence_length=length, micro_batch_size=micro_batch_size, device=device, display=display
    )
