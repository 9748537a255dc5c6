"""Tune: adapt a model to data within a memory budget; the result is a small delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


def tune(
    model: str,
    data: str,
    out: str,
    *,
    over: list[str] | None = None,
    method: str = "lora",
    targets: str | None = None,
    full: str | None = None,
    add_tokens: str | None = None,
    trainable: str | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    sequence_length: int | None = None,
    learning_rate: float | None = None,
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "power"] = "cosine",
    warmup: float = 0.05,
    cooldown: float = 0.2,
    optimizer: str = "adamw",
    state: Literal["fp32", "bf16", "8bit"] = "fp32",
    clip: float = 1.0,
    update_in_backward: bool = False,
    loss: Literal["cross_entropy", "stablemax"] = "cross_entropy",
    label_smoothing: float = 0.0,
    reweight: Literal["linupper", "quadratic", "extremes"] | None = None,
    reweight_temperature: float = 1.0,
    dropout: float = 0.0,
    eval_data: list[str] | None = None,
    eval_every: int = 0,
    checkpoint_every: int = 100,
    budget: str | None = None,
    micro_batch_size: int | None = None,
    recompute: bool | None = None,
    logits_chunk: int | None = None,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    base_bits: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Adapt a model to data within a memory budget; the result is a small delta.

    Args:
        model: a directory, `seedling`, or a hub id
        data: text file, folder of text files, .jsonl file, or stdlib:NAME; records with a label make a classifier
        out: directory of the delta (and, under run/, of checkpoints and metrics)
        over: directory of a delta that stays as it is, and that the new one is trained over; may be given several times, innermost first
        method: what is trained (see `espalier methods`)
        targets: parameters to update: roles such as attention,mlp,embedding or globs (sites of a branch); default: the method's own
        full: parameters that train whole beside the method's updates, such as norm,head: roles or globs; rest: all that it leaves
        add_tokens: new tokens, as a,b,c or a file of one a line; their rows of the vocabulary train, and the delta brings the tokenizer
        trainable: train at most so many numbers (such as 200k) or bytes of them (2MiB): sets the method's rank, or what stands for it
        steps: optimizer steps; give this or --epochs (default: 1 epoch)
        epochs: passes over the data
        batch_size: sequences per step, each of --sequence-length tokens (packed full)
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        learning_rate: peak rate; default: the method's own
        schedule: course of the learning rate after warm-up
        warmup: share of the steps that warm up, in [0, 1)
        cooldown: share of the steps at the end in which wsd, inverse_sqrt and power fall to their end, in (0, 1]
        optimizer: the optimizer (see `espalier methods --kind optim`)
        state: how its state is stored: fp32, bf16 rounded at random, or 8 bits in blocks of 256 (tensors of 4,096 numbers or more)
        clip: largest norm of the gradient; 0: no clipping
        update_in_backward: move each parameter as soon as its gradient is there, and free that; needs --clip 0, and one micro-batch a step but for optimizers whose gradients add up in a small form
        loss: what is trained on; stablemax is the cross-entropy with s(x) = x + 1, below zero 1 / (1 - x), for exp(x); measuring stays as it is
        label_smoothing: share of every target that is spread over the whole vocabulary, in [0, 1); of the training loss only
        reweight: weight the sequences of a step by their losses after the warm-up: linupper takes weight from what is known already (a second forward pass)
        reweight_temperature: the weights are a softmax over this; large: nearly equal weights
        dropout: probability of dropping entries of the updates' inputs, in [0, 1)
        eval_data: held-out data measured before and after; may be given several times
        eval_every: also measure every so many steps; 0: never
        checkpoint_every: steps between checkpoints; 0: only at the start
        budget: bound on the process's peak memory, such as 2GiB; chooses the next three
        micro_batch_size: sequences that are in memory at a time
        recompute: recompute activations in the backward pass
        logits_chunk: tokens whose logits are held at a time
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what the frozen model computes in; default: as stored
        base_bits: keep the frozen weights of linear layers and fused experts as codes of 8 or 4 bits
        threads: CPU threads
        seed: of starting values, order and dropout
        resume: go on with the run in --out after its last checkpoint
        quiet: print nothing but the result
        options: the method's and the optimizer's options

    Returns:
        What `--json` prints: where the delta is, its size, the losses, speed and memory.

    Raises:
        EspalierError: for anything wrong with the input, before a step is taken wherever that is possible.
    """
    from espalier.verbs._training import Job

    job = Job("tune", {k: v for k, v in locals().items() if k not in ("options", "Job")}, options, method)
    if (finished := job.finished()) is not None:
        return finished
    job.read_model()
    job.read_data()
    job.make_plan()
    job.load_model()
    job.attach()
    job.measure("before")
    job.train()
    job.save_delta(Path(out))
    job.measure("after")
    return job.report()
