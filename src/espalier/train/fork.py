"""Forks: a run that takes the first steps of another one as its own, and decays when it likes (WSD, arXiv:2404.06395).

The trunk's checkpoint is read and copied, and the trunk itself stays as it is: many runs of different lengths share one
stable phase. A fork ends in the bits of a run that had its schedule from the first step on, for it is refused wherever the two
would not have had the same learning rates so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.data.batches import Cursor
from espalier.display import Display
from espalier.errors import EspalierError
from espalier.train import checkpoint
from espalier.train.session import NONE, Record, read_record

FREE = (
    "steps", "epochs", "schedule", "warmup", "floor", "cooldown", "data", "eval_data", "eval_every", "checkpoint_every", "keep_checkpoints", "budget",
    "micro_batch_size", "recompute", "logits_chunk", "device", "threads", "quiet", "out", "resume", "fork", "tokenizer", "model",
)  # fmt: skip
"""Arguments that may be others than the trunk's: what they change is checked by itself (rates, fingerprints), or no result."""


@dataclass(frozen=True)
class Fork:
    """The checkpoint that a run begins with, and the record of the run that it is of."""

    path: Path
    step: int
    record: Record

    def check(self, verb: str, resolved: Mapping[str, Any], facts: Mapping[str, Any], rate: Callable[[int], float], rate_then: Callable[[int], float]) -> None:
        """Refuse a fork that is no continuation.

        Args:
            resolved, facts: of the new run.
            rate, rate_then: step to learning rate, of the new run and of the trunk.

        Raises:
            EspalierError: naming the argument or the step.
        """
        where, before = f"--fork {self.path}", self.record
        if before.verb != verb:
            raise EspalierError(f"{where} is of a run of {before.verb!r}, not of {verb!r}")
        for key in sorted(before.resolved.keys() | resolved.keys()):
            if key not in FREE and before.resolved.get(key) != resolved.get(key):
                raise EspalierError(f"{where}: {key} is {resolved.get(key)!r}, and was {before.resolved.get(key)!r} there; a fork has its trunk's")
        for key in ("base_fingerprint", "tokenizer"):
            if facts[key] != before.facts[key]:
                raise EspalierError(f"{where}: the {key.replace('_', ' ')} is {facts[key]}, and was {before.facts[key]} there; a fork has its trunk's")
        if resolved["steps"] <= self.step:
            raise EspalierError(f"{where}: --steps is {resolved['steps']}; it counts from the trunk's beginning, so it must be more than {self.step}")
        odd = next((step for step in range(self.step) if rate(step) != rate_then(step)), None)
        if odd is not None:
            raise EspalierError(
                f"{where}: step {odd + 1} had the learning rate {rate_then(odd):.6g} there, and would have {rate(odd):.6g}; fork where the trunk "
                "has not begun to fall, and with a --cooldown that begins later"
            )

    def load(self, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, same_data: bool, display: Display) -> checkpoint.State:
        """Put the trunk's tensors in place; other data are read from their beginning."""
        state, differences = checkpoint.load(self.path, tensors, optimizer)
        for key, (then, now) in differences.items():
            display.warn(f"{key} was {then} and is {now}: the result will not be bit-identical to an uninterrupted run's")
        if not same_data:
            state.cursor = Cursor()
        display.note(f"going on from {self.path} with {'the data that follow' if same_data else 'other data from their beginning'}")
        return state


def find(text: str, defaults: Mapping[str, Any] = NONE) -> Fork:
    """The fork that ``RUN@STEP``, or ``RUN`` for its last checkpoint, means; RUN is the --out of a run, ``defaults`` as :func:`read_record` takes them.

    Raises:
        EspalierError: when there is no such run or checkpoint, naming those that there are.
    """
    before, at, after = text.rpartition("@")
    folder, step = (before, after) if at and after.isdecimal() else (text, "")
    run = Path(folder) / "run"
    if not (run / "run.json").exists():
        raise EspalierError(f"--fork {text}: {folder} holds no run; give the --out of one, or RUN@STEP")
    known = {int(path.name.removeprefix("step-")): path for path in checkpoint.steps(run / "checkpoints")}
    if not known or (step and int(step) not in known):
        kept = ", ".join(map(str, known)) or "none"
        raise EspalierError(f"--fork {text}: there is no checkpoint of that step; there are: {kept} (--keep-checkpoints of the trunk keeps more)")
    chosen = int(step) if step else max(known)
    return Fork(known[chosen], chosen, read_record(run / "run.json", defaults))
