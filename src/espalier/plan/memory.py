"""What a job holds in memory, by phase and kind; and the micro-batch, recomputation and logits chunk that fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from espalier.errors import EspalierError
from espalier.memory import meter
from espalier.memory.meter import format_bytes
from espalier.plan.trace import Held, Traced

SPREAD = 0.31
"""Bytes that the C allocator loses between blocks of many sizes, per byte of activations and logits (measured: ``benchmarks/budget.py``)."""
RECOMPUTED = 0.56
"""Bytes that it loses beside these where activations are recomputed, per byte of them: they come and go once more in every block (measured)."""
LIBRARIES = 72 << 20
"""Bytes that torch's CPU libraries take at their first use (thread pools, compiled kernels), and what of the heap is never given back
(measured)."""
BACKWARD = 62 << 20
"""Bytes that they take beside these where there is a backward pass (measured)."""
COMPILED = 128 << 20
"""Bytes that numba and its compiler take, which the coding of optimizer state and large draws of random numbers import (measured: 122 MiB)."""
MARGIN = 0.12
"""Share of what is predicted beside the import baseline that a budget keeps free (measured: ``benchmarks/budget.py``)."""
DEFAULT_MICRO = 4096
"""Tokens of a micro-batch where no budget presses: more gain nothing on a CPU."""

KINDS = ("libraries", "weights", "trained", "gradients", "optimizer", "activations", "logits", "buffers")
"""``weights`` are the frozen ones, ``trained`` the numbers that train, ``optimizer`` its state, ``buffers`` all that is there for a moment:
pages of files being converted, decoded state, what the allocator loses."""
PHASES = ("data", "load", "first step", "steady state", "checkpoint", "export")
"""``data``: what a method wants to know of them is found out, where it wants to; ``export``: the result is written."""

Phases = dict[str, dict[str, int]]
"""Phase to kind to bytes, at the phase's worst moment."""


@dataclass(frozen=True)
class Plan:
    """How a run's steps are cut, and the resident bytes that this should take.

    Args:
        baseline: resident bytes of this process when nothing but imports had been done.
        predicted_peak: at the worst moment of all phases, ``baseline`` included.
    """

    micro_tokens: int
    recompute: bool
    logits_chunk: int
    predicted_peak: int
    baseline: int
    phases: Phases

    @property
    def worst(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def needs(self) -> int:
        """The least budget that allows it: the predicted peak, with the margin."""
        return round(self.predicted_peak + MARGIN * (self.predicted_peak - self.baseline))

    @property
    def resident_between(self) -> int:
        """Resident bytes above which the next micro-batch might pass the predicted peak, so that holes in the heap must be given up."""
        step = self.phases["steady state"]
        return self.needs - step["activations"] - step["logits"] - step["buffers"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Around:
    """Bytes of a job beside its steps.

    Args:
        baseline: resident in this process before anything but imports was done.
        replaced: of base values that training replaces, which are there until it begins.
        converted: of pages of a file that are being converted.
        starting: for making the starting values.
        looking: for looking at the data, before the model is loaded.
        state: of optimizer state, when all of it is there.
        updating: that an optimizer's step holds beside gradients and state; during the backward pass where it ``moves_early``.
        compiled: of compilers that are imported, by the first step.
        exported: made to store the result.
    """

    baseline: int
    replaced: int = 0
    converted: int = 0
    starting: int = 0
    looking: int = 0
    state: int = 0
    updating: int = 0
    exported: int = 0
    moves_early: bool = False
    compiled: int = 0


def predict(around: Around, traced: Traced, held: Held, recompute: bool, on_cpu: bool = True) -> Phases:
    """What each phase holds at its worst moment, by kind.

    Args:
        held: what forward and backward hold.
        recompute: whether the step recomputes its activations.
    """
    whole = {"weights": traced.model, "trained": 4 * traced.trained}
    loading = traced.model + around.replaced
    state = around.state
    spread = round((SPREAD + RECOMPUTED * recompute) * (held.activations + held.logits) if on_cpu else 0.1 * held.total)
    step = {"gradients": held.gradients, "activations": held.activations, "logits": held.logits, "buffers": spread + around.moves_early * around.updating}
    update = {**whole, "gradients": traced.gradients, "optimizer": state, "buffers": around.updating}
    moments: dict[str, list[dict[str, int]]] = {
        "data": [{"buffers": around.looking}] if around.looking else [],
        "load": [{"weights": loading, "buffers": around.converted}, {**whole, "weights": loading, "buffers": around.starting}],
        "first step": [{**whole, **step}, update],
        "steady state": [{**whole, "optimizer": state, **step}, update],
        "checkpoint": [{**whole, "optimizer": state}],
        "export": [{**whole, "buffers": around.exported}],
    }
    libraries = around.baseline + (LIBRARIES if on_cpu else 0)
    later = around.compiled + (BACKWARD if on_cpu and traced.gradients else 0)
    made = {}
    for phase, found in moments.items():
        if found:
            worst = max(found, key=lambda moment: sum(moment.values()))
            made[phase] = dict.fromkeys(KINDS, 0) | worst | {"libraries": libraries + (0 if phase in ("data", "load") else later)}
    return made


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
    budget: int, what: str, options: Sequence[tuple[int, bool, int]], baseline: int, price: Callable[[int, bool, int], Phases]
) -> Plan:  # fmt: skip
    """The first option whose predicted peak fits, with the margin, into ``budget`` bytes, which an error calls ``what``.

    Raises:
        EspalierError: when none does, naming the least that would.
    """
    tried = (plan_of(option, baseline, price) for option in options)
    if (found := next((plan for plan in tried if plan.needs <= budget), None)) is not None:
        return found
    least = leanest(options, baseline, price)
    raise EspalierError(
        f"{what} is too small: the least that would do is {format_bytes(least.needs)} "
        f"(micro-batches of {least.micro_tokens} tokens{', recomputation' if least.recompute else ''}, logits of "
        f"{least.logits_chunk} tokens at a time). Raise it, or lower --sequence-length"
    )


def plan_of(option: tuple[int, bool, int], baseline: int, price: Callable[[int, bool, int], Phases]) -> Plan:
    """The plan of one option: (micro_tokens, recompute, logits_chunk)."""
    phases = price(*option)
    return Plan(*option, max(sum(kinds.values()) for kinds in phases.values()), baseline, phases)


def leanest(options: Sequence[tuple[int, bool, int]], baseline: int, price: Callable[[int, bool, int], Phases]) -> Plan:
    """The plan that needs the least."""
    return min((plan_of(option, baseline, price) for option in options), key=lambda plan: plan.needs)


def available_memory(device: torch.device) -> int:
    """Bytes that this machine could give a process on the device now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else meter.available_memory()
