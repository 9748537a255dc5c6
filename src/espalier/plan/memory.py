"""Choosing micro-batch, recomputation and logits chunk so that a run stays inside its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from espalier.errors import EspalierError
from espalier.memory import meter
from espalier.memory.meter import format_bytes
from espalier.plan.trace import Traced

SPREAD = 2.0
"""Bytes that the C allocator loses between blocks of many sizes, per byte of a step's working set: what it holds
beside the activations that it keeps, that is, what it holds when it recomputes them (measured: ``benchmarks/budget.py``)."""
LIBRARIES = 96 << 20
"""Bytes that torch's CPU libraries take at their first use (thread pools, compiled kernels; measured)."""
COMPILED = 128 << 20
"""Bytes that numba and its compiler take, which the coding of optimizer state and large draws of random numbers import (measured: 122 MiB)."""
MOVING = 80 << 20
"""Bytes of a step of an optimizer for what it works on at once: five times ``memory.rule.BUCKET`` in float32. Where parameters are moved
after the backward pass, its activations are gone by then, and this is below the peak."""
MARGIN = 0.1
"""Share that is kept free: the peaks of ``benchmarks/budget.py`` lie up to 8 % above the rest of the prediction."""
DEFAULT_MICRO = 4096
"""Tokens of a micro-batch where no budget presses: more gain nothing on a CPU."""


@dataclass(frozen=True)
class Plan:
    """How a run's steps are cut, and the resident bytes that this should take at the worst moment."""

    micro_tokens: int
    recompute: bool
    logits_chunk: int
    predicted_peak: int
    parts: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    baseline: int, load: int, traced: Traced, working_set: int, optimizer: int, on_cpu: bool = True, statistics: int = 0
) -> dict[str, int]:
    """Bytes by kind.

    Args:
        baseline: resident bytes of this process before the model is loaded.
        load: bytes that loading needs beside the model (file pages being converted).
        working_set: bytes that the step would hold if it recomputed its activations.
        optimizer: bytes of optimizer state.
        statistics: bytes that looking at the data takes, before the model is loaded.
    """
    step = traced.peak + SPREAD * working_set if on_cpu else 1.1 * traced.peak
    looking = {"statistics": statistics} if statistics else {}
    return {
        "libraries": baseline + LIBRARIES,
        "model": traced.model,
        "trained": 4 * traced.trained,
        "optimizer": optimizer,
        "step": round(step),
        "load": load,
        **looking,
    }


def peak_of(parts: dict[str, int]) -> int:
    """The worst moment: looking at the data, loading, or a step once the optimizer has its state; with the margin."""
    resident = parts["libraries"] + parts["model"]
    looking = parts["libraries"] + parts.get("statistics", 0)
    worst = max(looking, resident + parts["load"], resident + parts["trained"] + parts["optimizer"] + parts["step"])
    return round(worst * (1 + MARGIN))


def resident_between(budget: int, plan: Plan) -> int:
    """Resident bytes above which the next micro-batch might not fit into the budget, so that holes in the heap must be given up."""
    return round(budget / (1 + MARGIN)) - plan.parts["step"]


def default_chunk(vocabulary: int) -> int:
    """Tokens whose logits are held at a time: about 64 MiB of them, 64 to 1,024 tokens."""
    return max(64, min(1024, (64 << 20) // (10 * vocabulary) // 64 * 64))


def candidates(
    batch_tokens: int, sequence_length: int, chunk: int, fixed: dict[str, Any]
) -> Iterator[tuple[int, bool, int]]:
    """(micro_tokens, recompute, logits_chunk), fastest first; what the user fixed is not varied."""
    micros = []
    micro = max(sequence_length, min(batch_tokens, DEFAULT_MICRO) // sequence_length * sequence_length)
    while micro >= sequence_length:
        micros.append(micro)
        if micro == sequence_length:
            break
        micro = max(sequence_length, micro // 2 // sequence_length * sequence_length)
    if fixed.get("micro_batch_size"):
        micros = [fixed["micro_batch_size"] * sequence_length]
    recomputes = [False, True] if fixed.get("recompute") is None else [bool(fixed["recompute"])]
    chunks = [fixed["logits_chunk"]] if fixed.get("logits_chunk") else sorted({chunk, 64}, reverse=True)
    for recompute in recomputes:
        for micro in micros:
            yield micro, recompute, chunks[0]
        if len(chunks) > 1:
            yield micros[-1], recompute, chunks[-1]


def choose(
    budget: int,
    what: str,
    options: Iterator[tuple[int, bool, int]],
    price: Callable[[int, bool, int], dict[str, int]],
) -> Plan:
    """The first option whose predicted peak fits into ``budget`` bytes, which an error calls ``what``.

    Raises:
        EspalierError: when none does, naming the least that would.
    """
    least: Plan | None = None
    for micro, recompute, chunk in options:
        parts = price(micro, recompute, chunk)
        plan = Plan(micro, recompute, chunk, peak_of(parts), parts)
        if plan.predicted_peak <= budget:
            return plan
        if least is None or plan.predicted_peak < least.predicted_peak:
            least = plan
    assert least is not None
    raise EspalierError(
        f"{what} is too small: the least that would do is {format_bytes(least.predicted_peak)} "
        f"(micro-batches of {least.micro_tokens} tokens{', recomputation' if least.recompute else ''}, logits of "
        f"{least.logits_chunk} tokens at a time). Raise it, or lower --sequence-length"
    )


def available_memory(device: torch.device) -> int:
    """Bytes that this machine could give a process on the device now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else meter.available_memory()
