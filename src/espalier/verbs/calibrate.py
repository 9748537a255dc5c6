"""Calibrate: statistics of what data do inside a model, one block in memory at a time."""

from __future__ import annotations

from typing import Any, Literal


def calibrate(
    model: str,
    data: str,
    out: str,
    want: str,
    *,
    targets: str = "all",
    tokens: int = 131072,
    sequence_length: int | None = None,
    batch_size: int = 8,
    rank: int = 32,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Statistics of what data do inside a model, by name, one block in memory at a time.

    Args:
        model: a directory, `seedling`, or a hub id
        data: text file, folder of text files, .jsonl file, or stdlib:NAME
        out: file of the statistics (safetensors)
        want: statistics, comma-separated: mean,variance,second_moment,norm,absmax,singular_vectors,output_mean,output_variance,gradient,fisher,gradient_norm
        targets: parameters to watch: roles such as attention,mlp,head or globs
        tokens: stop drawing sequences at so many tokens; 0: all of the data
        sequence_length: longest sequence, in tokens; default: 512, or all positions of a model with fewer
        batch_size: sequences whose activations wait for one addition; costs memory, changes no more than the last float64 digits
        rank: how many singular vectors
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what to compute in; default: as stored
        threads: CPU threads
        seed: of the choice of sequences
        quiet: print nothing but the result

    Returns:
        `out`, `bytes`, `statistics`, `tokens`, `sequences`, `loss` (nats per target token; only with gradients), `coverage`
        (tokens per input, a list per expert), `unseen` (experts that no token came to), `cached`, `resumed_at`,
        `resident_parameters` (most bytes of weights in memory at once) and `peak_memory`.

    Raises:
        EspalierError: for anything wrong with the model, the data or the request, or a model that cannot be walked.
    """
    from pathlib import Path

    from espalier.attach.device import pick_device
    from espalier.attach.load import load_config, load_tokenizer, torch_dtype
    from espalier.calibrate.make import make
    from espalier.calibrate.statistics import parse_want
    from espalier.calibrate.store import Request, deliver, load, refuse_other
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.data.encode import Encoder
    from espalier.data.sources import open_source
    from espalier.data.store import open_store
    from espalier.display import Display
    from espalier.errors import at_least
    from espalier.memory.meter import format_bytes, peak_memory
    from espalier.train import session

    wanted = tuple(parse_want(want))
    for name, value, least in (("tokens", tokens, 0), ("batch_size", batch_size, 1), ("rank", rank, 1)):
        at_least(name, value, least)
    if sequence_length is not None:
        at_least("sequence_length", sequence_length, 1)
    display, target = Display(quiet), Path(out)
    session.seed_everything(seed, threads)
    directory = ModelDirectory(resolve_model(model))
    store = open_store(open_source(data), Encoder(load_tokenizer(model)))
    computed = torch_dtype(dtype, directory)
    request = Request.of(
        model=directory.fingerprint(), data=store.digest, want=wanted, targets=targets, tokens=tokens, dtype=computed, rank=rank, seed=seed,
        sequence_length=session.fitting_length(sequence_length, load_config(directory.path)),
    )  # fmt: skip
    refuse_other(target, request)
    found, facts = make(
        directory, store, request, dtype=computed, device=pick_device(device), batch_size=batch_size,
        bar=lambda total: display.bar("calibrating", total, "sequences"), note=display.note,
    )  # fmt: skip
    deliver(found, target, request)
    if facts["cached"]:
        display.note(f"this calibration was made before; it was taken from the cache ({found.path})")
    made = load(target)
    unseen = {name: [e for e, seen in enumerate(tokens) if not seen] for name, tokens in made.coverage.items()}
    unseen = {name: experts for name, experts in unseen.items() if experts}
    _show(made, unseen, display)
    size = target.stat().st_size
    display.note(f"{made.facts['tokens']:,} tokens in {made.facts['sequences']:,} sequences; the statistics are in {target} ({format_bytes(size)})")
    return {
        "out": str(target), "bytes": size, "statistics": made.statistics, "tokens": made.facts["tokens"],
        "sequences": made.facts["sequences"], "loss": made.facts["loss"], "coverage": made.coverage, "unseen": unseen,
        "cached": facts["cached"], "resumed_at": facts["resumed_at"], "resident_parameters": facts["resident"],
        "peak_memory": peak_memory(),
    }  # fmt: skip


def _show(made: Any, unseen: dict[str, list[int]], display: Any) -> None:
    """The coverage of inputs that experts share out; what all tokens came to is no news."""
    rows = [
        (name, len(tokens), min(tokens), sum(tokens) // len(tokens), max(tokens))
        for name, tokens in made.coverage.items()
        if len(tokens) > 1
    ]
    if rows:
        display.table("tokens per expert", ("input", "experts", "least", "mean", "most"), rows)
    if unseen:
        names = ", ".join(f"{name} [{', '.join(map(str, experts))}]" for name, experts in unseen.items())
        display.warn(f"no token came to these experts, so that their statistics are zero: {names}; more or other data may reach them")
