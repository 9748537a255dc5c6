"""Eval: loss, perplexity and bits per byte of a model, with or without deltas."""

from __future__ import annotations

from typing import Any, Literal


def eval(
    model: str,
    data: str,
    *,
    delta: list[str] | None = None,
    scale: float = 1.0,
    any_base: bool = False,
    sequence_length: int | None = None,
    micro_batch_size: int = 8,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a model on held-out data, with or without deltas.

    Args:
        model: a directory, `seedling`, or a hub id
        data: text file, folder of text files, .jsonl file, or stdlib:NAME
        delta: directory of a delta; may be given several times, innermost first
        scale: multiplies every delta; 0 is the base
        any_base: accept deltas that were made for another base
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        micro_batch_size: sequences that run at a time
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what to compute in; default: as stored
        threads: CPU threads
        quiet: print nothing but the result

    Returns:
        `loss` (nats per target token), `perplexity`, `bits_per_byte`, `confidence` (mean of the largest probability), `tokens`,
        `bytes`, `documents`, `peak_memory`.

    Raises:
        EspalierError: for anything wrong with the model, a delta or the data.
    """
    from pathlib import Path

    from espalier.attach.load import load_model, load_tokenizer, put_on
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.data.encode import Encoder
    from espalier.data.sources import open_source
    from espalier.data.store import open_store
    from espalier.display import Display
    from espalier.errors import at_least
    from espalier.evaluate.perplexity import score
    from espalier.memory.meter import peak_memory
    from espalier.memory.training_form import training_form
    from espalier.plan.memory import default_chunk
    from espalier.train import session

    at_least("micro_batch_size", micro_batch_size, 1)
    if sequence_length is not None:
        at_least("sequence_length", sequence_length, 1)
    display = Display(quiet)
    session.seed_everything(0, threads)
    directory = ModelDirectory(resolve_model(model))
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer)
    store = open_store(open_source(data), encoder)
    loaded = load_model(directory.path, dtype, device)
    sequence_length = session.fitting_length(sequence_length, loaded.config)
    for folder in delta or ():
        manifest = put_on(loaded, Path(folder), directory, any_base=any_base, scale=scale).manifest
        session.check_tokenizer(manifest, folder, encoder, store.kind, display)
    padded = session.must_pad(loaded, loaded.config.vocab_size, display)
    form = training_form(
        loaded, chunk=default_chunk(loaded.config.vocab_size), recompute=False, padded=padded
    )
    with form, display.bar(f"measuring {data}", store.predictions, "tokens") as update:
        result = score(
            loaded, store, sequence_length, sequence_length * micro_batch_size, padded=padded,
            pad_token=session.pad_token(tokenizer), progress=update,
        )  # fmt: skip
    return {**result.as_json(), "peak_memory": peak_memory()}
