"""Eval: loss, perplexity and bits per byte of a model, or the accuracy of a classifier, with or without deltas."""

from __future__ import annotations

from typing import Any, Literal


def eval(
    model: str,
    data: str,
    *,
    delta: list[str] | None = None,
    scale: float = 1.0,
    any_base: bool = False,
    expert: list[str] | None = None,
    expert_base: str | None = None,
    fusion: Literal["one", "all"] = "one",
    fusion_alpha: float | None = None,
    sequence_length: int | None = None,
    micro_batch_size: int = 8,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a model on held-out data, or accuracy and macro-F1 of a classifier, with or without deltas.

    Args:
        model: a directory, `seedling`, or a hub id
        data: text file, folder of text files, .jsonl file, or stdlib:NAME; records with a label are for a classifier
        delta: directory of a delta; may be given several times, innermost first
        scale: multiplies every delta; 0 is the base
        any_base: accept deltas that were made for another base
        expert: a tuned smaller model, or a delta of --expert-base, whose change moves this model's logits (see `espalier generate`)
        expert_base: the smaller model that the experts were tuned from; it must have the vocabulary of --model
        fusion: of several experts, whether one acts on a token or all may
        fusion_alpha: how much of the experts' change is added (1: proxy tuning); default: found for each token, in [0, 2]
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        micro_batch_size: sequences that run at a time
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what to compute in; default: as stored
        threads: CPU threads
        quiet: print nothing but the result

    Returns:
        `loss` (nats per target token), `perplexity`, `bits_per_byte`, `confidence` (mean of the largest probability), `tokens`,
        `bytes`, `documents`, `peak_memory`; with experts `alpha`, the mean coefficient of each. Of a classifier: `loss` (nats per
        text), `accuracy`, `macro_f1`, `f1` by label, `examples`, `truncated` of these, `tokens`, `peak_memory`.

    Raises:
        EspalierError: for anything wrong with the model, a delta or the data.
    """
    from contextlib import ExitStack
    from pathlib import Path

    from espalier.attach.attachment import attachments, positions_taken
    from espalier.attach.load import load_model, load_tokenizer, put_on
    from espalier.checkpoint.directory import ModelDirectory, resolve_model
    from espalier.data.encode import Encoder
    from espalier.data.sources import open_source
    from espalier.data.store import open_store
    from espalier.display import Display
    from espalier.errors import EspalierError, at_least
    from espalier.evaluate.logit_fusion import FusedLoss, Voice
    from espalier.memory.meter import peak_memory
    from espalier.memory.training_form import training_form
    from espalier.plan.memory import default_chunk
    from espalier.train import session
    from espalier.verbs._experts import Asked
    from espalier.verbs._tasks import task_of

    asked = Asked(expert, expert_base, fusion, fusion_alpha)
    at_least("micro_batch_size", micro_batch_size, 1)
    if sequence_length is not None:
        at_least("sequence_length", sequence_length, 1)
    display = Display(quiet)
    session.seed_everything(0, threads)
    directory = ModelDirectory(resolve_model(model))
    tokenizer = load_tokenizer(model, delta or ())
    encoder = Encoder(tokenizer)
    store = open_store(open_source(data), encoder)
    loaded = load_model(directory.path, dtype, device, delta or ())
    task = task_of(store, data, encoder, loaded)
    if asked and store.kind == "label":
        raise EspalierError("experts move the logits of tokens; --expert does not go with labelled data")
    for folder in delta or ():
        manifest = put_on(loaded, Path(folder), directory, any_base=any_base, scale=scale).manifest
        session.check_tokenizer(manifest, folder, encoder, store.kind, display)
    sequence_length = session.fitting_length(sequence_length, loaded.config, positions_taken(loaded))
    chunk, padded = default_chunk(loaded.config.vocab_size), task.must_pad(loaded, display)
    scored: Any = loaded
    models = [loaded]
    if asked:
        base, experts = asked.voices(tokenizer, store.kind, any_base, device, dtype, display)
        for small in {id(voice.model): voice.model for voice in (base, *experts)}.values():
            sequence_length = session.fitting_length(sequence_length, small.config)
            padded = session.must_pad(small, small.config.vocab_size, display) or padded
            models.append(small)
        scored = FusedLoss(asked.fusion(), Voice(loaded, tuple(attachments(loaded))), base, experts, max(chunk // (4 * len(models)), 1))
    with ExitStack() as stack:
        for small in models:
            stack.enter_context(training_form(small, chunk=chunk, recompute=False, padded=padded))
        with display.bar(f"measuring {data}", task.size(store), task.unit) as update:
            result = task.score(scored, store, sequence_length, sequence_length * micro_batch_size, padded, update)
    more = {"alpha": scored.fusion.mean_alpha} if asked else {}
    return {**result.as_json(), **more, "peak_memory": peak_memory()}
