"""The training loop: micro-batches, the mean over target tokens, clipping, the optimizer, and its record.

The loop knows a model that returns its loss, an order of windows and a set of trained parameters. It knows
no method and no family.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import nn

from espalier.attach.course import Course
from espalier.checkpoint.atomic import write_text
from espalier.data.batches import Batch, Cursor
from espalier.errors import NotFiniteError
from espalier.memory.chunked_loss import Kind
from espalier.memory.meter import peak_memory, resident_memory
from espalier.train import checkpoint, reweight, schedules
from espalier.train.steps import ADVICE, ByGradients, ByLosses, DuringBackward, Losses, targets_of


@dataclass
class Settings:
    """The loop's own numbers; sizes in tokens, intervals in steps (0: never)."""

    steps: int
    batch_tokens: int
    micro_tokens: int
    learning_rate: float
    schedule: schedules.Shape = "cosine"
    warmup: int = 0
    floor: float = 0.0
    decay: float = 0.2
    knee: float | None = None
    clip: float = 1.0
    label_smoothing: float = 0.0
    loss: Kind = "cross_entropy"
    reweight: reweight.Shape | None = None
    """How sequences are weighted by their losses after the warm-up, if they are."""
    reweight_temperature: float = 1.0
    checkpoint_every: int = 0
    keep_checkpoints: int = checkpoint.KEPT
    evaluate_every: int = 0
    padded: bool = False
    pad_token: int = 0
    in_backward: bool = False
    """Whether parameters are moved during the backward pass; then ``clip`` is 0."""
    resident_between: int = 0
    """Resident bytes above which free memory goes back to the system before a micro-batch; 0: never."""

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, from 0."""
        return self.learning_rate * schedules.factor(self.schedule, step, self.steps, self.warmup, self.floor, self.decay, self.knee)


@dataclass
class Step:
    """What one step did: loss in nats per target token, gradient norm before clipping, rates and memory.

    Of gradients of several micro-batches that are summed in a smaller form, the sum of their norms is taken, a bound. Where the
    optimizer is zeroth-order, the norm is that which its estimates of slopes have on average.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    target_tokens: int
    tokens: int
    tokens_per_second: float
    memory: int
    seconds: float
    epoch: int


@dataclass
class Hooks:
    """What the loop tells of: each is called with what happened, and returns nothing."""

    on_step: Callable[[Step], None] = lambda step: None
    on_evaluate: Callable[[int], dict[str, Any]] | None = None
    on_checkpoint: Callable[[Path], None] = lambda path: None


class Order(Protocol):
    """What is learnt from, in which order: the micro-batches of the step at a cursor, which it moves."""

    def batches(self, cursor: Cursor, batch_tokens: int, micro_tokens: int, padded: bool, pad_token: int) -> list[Batch]: ...


@dataclass
class Run:
    """A training run on disk: ``metrics.jsonl`` and ``checkpoints/`` under ``folder``."""

    folder: Path
    state: checkpoint.State = field(default_factory=lambda: checkpoint.State(0, Cursor(), 0, 0.0))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be done again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the line that a kill cut short
                break
        write_text(self.metrics, "".join(kept))


def _first_not_finite(parameters: dict[str, nn.Parameter], gradients: bool) -> str | None:
    for name, parameter in parameters.items():
        tensor = parameter.grad if gradients else parameter
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _refuse_not_finite(
    step: int, begin: Cursor, batches: list[Batch], parameters: dict[str, nn.Parameter], loss: float, norm: float,
    advice: str = ADVICE,
) -> None:  # fmt: skip
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    tokens, where = sum(batch.tokens for batch in batches), _where_not_finite(parameters)
    raise NotFiniteError(
        f"stopped at step {step}: {what} on its batch of {tokens} tokens in {len(batches)} micro-batches (epoch {begin.epoch}, "
        f"from window {begin.position} of its order); {where}. {advice}"
    )


def _where_not_finite(parameters: dict[str, nn.Parameter]) -> str:
    if broken := _first_not_finite(parameters, gradients=False):
        return f"parameter {broken} is not finite"
    if broken := _first_not_finite(parameters, gradients=True):
        return f"the gradient of {broken} is not finite"
    return "every trained parameter and gradient is finite"


def _refuse_to_keep_not_finite(step: int, parameters: dict[str, nn.Parameter]) -> None:
    """Before anything is written: a finite gradient times a large rate can still be too much for a parameter."""
    if broken := _first_not_finite(parameters, gradients=False):
        raise NotFiniteError(f"stopped at step {step}: it made parameter {broken} infinite or NaN. {ADVICE}")


def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    order: Order,
    settings: Settings,
    course: Course,
    run: Run,
    hooks: Hooks,
) -> None:
    """Train until ``settings.steps``, from ``run.state`` on.

    Raises:
        NotFiniteError: on the first loss or gradient that is NaN or infinite, before it reaches a parameter, and on
            parameters that are, before they reach a checkpoint. Where parameters are moved during the backward pass, those
            whose gradients came before have moved.
        EspalierError: where a method needs the gradients of a whole step, and there are none.
    """
    device = next(iter(parameters.values())).device
    state = run.state
    weigh = None
    if settings.reweight is not None:
        weigh = functools.partial(reweight.weights, shape=settings.reweight, temperature=settings.reweight_temperature)
    course.check()
    run.folder.mkdir(parents=True, exist_ok=True)
    model.train()
    kind = ByLosses if getattr(optimizer, "zeroth_order", False) else DuringBackward if settings.in_backward else ByGradients
    losses = Losses(model, settings.resident_between, settings.label_smoothing, settings.loss)
    way = kind(losses, parameters, optimizer, course, settings.clip)
    with contextlib.closing(way), run.metrics.open("a", encoding="utf-8") as metrics:
        while state.step < settings.steps:
            began = time.perf_counter()
            step = state.step
            rate = settings.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
            begin = dataclasses.replace(state.cursor)
            step_batches = order.batches(state.cursor, settings.batch_tokens, settings.micro_tokens, settings.padded, settings.pad_token)
            batches = [batch.to(device) for batch in step_batches]
            course.begin(step, rate, optimizer, functools.partial(losses.mean, batches))
            refuse = functools.partial(_refuse_not_finite, step + 1, begin, batches, parameters)
            loss, norm = way.take(batches, weigh if step >= settings.warmup else None, refuse)
            last = step + 1 == settings.steps
            kept = last or (settings.checkpoint_every > 0 and (step + 1) % settings.checkpoint_every == 0)
            if kept:
                _refuse_to_keep_not_finite(step + 1, parameters)
            seconds = time.perf_counter() - began
            tokens = sum(batch.tokens for batch in batches)
            state.step, state.tokens, state.seconds = step + 1, state.tokens + tokens, state.seconds + seconds
            record = Step(
                step + 1, loss, rate, norm, targets_of(batches), tokens, tokens / seconds, resident_memory(), seconds, state.cursor.epoch
            )
            _write(metrics, dict(record.__dict__))
            hooks.on_step(record)
            if kept and settings.checkpoint_every:
                tensors = {**parameters, **course.kept()}
                hooks.on_checkpoint(checkpoint.save(run.checkpoints, tensors, optimizer, state, settings.keep_checkpoints))
            if hooks.on_evaluate and settings.evaluate_every and state.step % settings.evaluate_every == 0 and not last:
                result = hooks.on_evaluate(state.step)
                _write(metrics, {"step": state.step, "peak_memory": peak_memory(), **result})
                model.train()
    course.finish()


def _write(metrics: IO[str], record: dict[str, Any]) -> None:
    metrics.write(json.dumps(record) + "\n")
    metrics.flush()
