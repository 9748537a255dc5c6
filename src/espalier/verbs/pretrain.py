"""Pretrain: train a causal language model from raw text, from nothing or on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


def pretrain(
    data: str,
    out: str,
    *,
    architecture: str | None = None,
    tokenizer: str | None = None,
    model: str | None = None,
    method: str = "full",
    targets: str | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 16,
    sequence_length: int | None = None,
    learning_rate: str | float = 1e-3,
    mup: str | None = None,
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "power"] = "cosine",
    warmup: float = 0.02,
    floor: float = 0.05,
    cooldown: float = 0.2,
    optimizer: str = "adamw",
    state: Literal["fp32", "bf16", "8bit"] = "fp32",
    clip: float = 1.0,
    update_in_backward: bool = False,
    loss: Literal["cross_entropy", "stablemax"] = "cross_entropy",
    reweight: Literal["linupper", "quadratic", "extremes"] | None = None,
    reweight_temperature: float = 1.0,
    eval_data: list[str] | None = None,
    eval_every: int = 0,
    checkpoint_every: int = 200,
    keep_checkpoints: int = 2,
    fork: str | None = None,
    budget: str | None = None,
    micro_batch_size: int | None = None,
    recompute: bool | None = None,
    logits_chunk: int | None = None,
    device: str | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a causal language model from raw text, from nothing or on from a checkpoint.

    Args:
        data: text file, folder of text files, .jsonl file, or stdlib:NAME
        out: directory of the model (and, under run/, of checkpoints and metrics)
        architecture: a transformers config.json to start from random weights; needs --tokenizer
        tokenizer: directory of the tokenizer of a new model
        model: directory, `seedling` or hub id to go on from, instead of --architecture
        method: how the weights are made and trained: full, or another that updates parameters (see `espalier methods`)
        targets: the parameters that it is for: roles such as attention,mlp or globs; default: the method's own; the rest trains whole
        steps: optimizer steps; give this or --epochs (default: 1 epoch)
        epochs: passes over the data
        batch_size: sequences per step, each of --sequence-length tokens (packed full)
        sequence_length: longest context, in tokens; default: 512, or all positions of a model with fewer
        learning_rate: peak rate, or auto: that of the Step Law for the size of model and data
        mup: config.json of a narrower model, for which the learning rate is meant: muP makes it and the random weights fit this one's width
        schedule: course of the learning rate after warm-up
        warmup: share of the steps that warm up, in [0, 1)
        floor: learning rate at the end, as a share of the peak
        cooldown: share of the steps at the end in which wsd, inverse_sqrt and power fall to their end, in (0, 1]
        optimizer: the optimizer (see `espalier methods --kind optim`)
        state: how its state is stored: fp32, bf16 rounded at random, or 8 bits in blocks of 256 (tensors of 4,096 numbers or more)
        clip: largest norm of the gradient; 0: no clipping
        update_in_backward: move each parameter as soon as its gradient is there, and free that; needs --clip 0, and one micro-batch a step but for optimizers whose gradients add up in a small form
        loss: what is trained on; stablemax is the cross-entropy with s(x) = x + 1, below zero 1 / (1 - x), for exp(x); measuring stays as it is
        reweight: weight the sequences of a step by their losses after the warm-up: linupper takes weight from what is known already (a second forward pass)
        reweight_temperature: the weights are a softmax over this; large: nearly equal weights
        eval_data: held-out data measured at the end; may be given several times
        eval_every: also measure every so many steps; 0: never
        checkpoint_every: steps between checkpoints; 0: only at the start
        keep_checkpoints: how many of them stay, the last ones; 0: all
        fork: begin with a checkpoint of another run, given as its --out or OUT@STEP; the warm-up, and all options but the rest of the schedule and the data, are that run's
        budget: bound on the process's peak memory, such as 2GiB; chooses the next three
        micro_batch_size: sequences that are in memory at a time
        recompute: recompute activations in the backward pass
        logits_chunk: tokens whose logits are held at a time
        device: such as cpu or cuda; default: cuda where there is one
        dtype: what the model computes in; its weights train in float32 and are stored in this
        threads: CPU threads
        seed: of the random weights and the order of the data
        resume: go on with the run in --out after its last checkpoint
        quiet: print nothing but the result
        options: the method's and the optimizer's options

    Returns:
        What `--json` prints: where the model is, the losses, speed and memory.

    Raises:
        EspalierError: for anything wrong with the input, before a step is taken wherever that is possible.
    """
    from espalier import registry
    from espalier.verbs._training import Job

    registry.find(method, "adapter")  # nothing but parameters is a part of a checkpoint
    job = Job("pretrain", {k: v for k, v in locals().items() if k not in ("options", "Job", "registry")}, options, method)
    if (finished := job.finished()) is not None:
        return finished
    job.read_model()
    job.read_data()
    job.make_plan()
    job.load_model()
    job.attach()
    job.train()
    job.save_model(Path(out))
    job.measure("after")
    return job.report()
