"""Plan: what a training job will hold in memory, said from its model's shapes alone."""

from __future__ import annotations

from typing import Any, Literal


def plan(
    model: str | None = None,
    *,
    architecture: str | None = None,
    tokenizer: str | None = None,
    data: str | None = None,
    over: list[str] | None = None,
    method: str | None = None,
    targets: str | None = None,
    full: str | None = None,
    add_tokens: str | None = None,
    trainable: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    optimizer: str = "adamw",
    state: Literal["fp32", "bf16", "8bit"] = "fp32",
    update_in_backward: bool = False,
    dropout: float = 0.0,
    budget: str | None = None,
    micro_batch_size: int | None = None,
    recompute: bool | None = None,
    logits_chunk: int | None = None,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    base_bits: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Say what a training job will hold in memory, phase by phase, and which settings a budget chooses; nothing is loaded or run.

    Args:
        model: a directory, `seedling`, or a hub id; of its weights only shapes are read
        architecture: a transformers config.json, for a model that pretrain begins, instead of --model
        tokenizer: directory of its tokenizer, where --data or --add-tokens needs one
        data: what would be learnt from; for labels and tasks, which change the model, and the length of an epoch; default: text
        over: directory of a delta that stays as it is, and that the new one is trained over; may be given several times, innermost first
        method: what is trained (see `espalier methods`); default: lora, and full with --architecture
        targets: parameters to update, as in tune
        full: parameters that train whole beside the method's updates, as in tune
        add_tokens: new tokens, as in tune
        trainable: train at most so many numbers (such as 200k) or bytes of them (2MiB), as in tune
        steps: optimizer steps, for methods that need so many at least
        batch_size: sequences per step, each of --sequence-length tokens (packed full); default: 8, and 16 with --architecture
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        optimizer: the optimizer (see `espalier methods --kind optim`)
        state: how its state is stored: fp32, bf16 rounded at random, or 8 bits in blocks of 256 (tensors of 4,096 numbers or more)
        update_in_backward: move each parameter as soon as its gradient is there, as in tune
        dropout: probability of dropping entries of the updates' inputs, in [0, 1)
        budget: bound on the process's peak memory, such as 2GiB; chooses the next three, which are the fastest where there is none
        micro_batch_size: sequences that are in memory at a time
        recompute: recompute activations in the backward pass
        logits_chunk: tokens whose logits are held at a time
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what the frozen model computes in; default: as stored, and bf16 with --architecture
        base_bits: keep the frozen weights of linear layers and fused experts as codes of 8 or 4 bits
        threads: CPU threads
        seed: of what is drawn to train, where a method draws it
        quiet: print nothing but the result
        options: the method's and the optimizer's options

    Returns:
        What `--json` prints: bytes by phase and kind, the settings, and what the job needs.

    Raises:
        EspalierError: for what tune would refuse before it loads the model.
    """
    from espalier.verbs._training import Job

    new = architecture is not None
    arguments = {k: v for k, v in locals().items() if k not in ("options", "Job", "new")}
    arguments["batch_size"] = batch_size if batch_size is not None else 16 if new else 8
    arguments |= {"method": method or ("full" if new else "lora"), "dtype": dtype or ("bf16" if new else None), "full": full or ("rest" if new else None)}
    job = Job("plan", arguments, options, arguments["method"])
    job.read_model()
    if data is not None:
        job.read_data()
    job.make_plan()
    return job.prediction()
