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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import nn

from espalier.attach.course import Course
from espalier.attach.tasks import choose_task
from espalier.checkpoint.atomic import write_text
from espalier.data.batches import Batch, Cursor
from espalier.errors import NotFiniteError
from espalier.memory.in_backward import InBackward
from espalier.memory.language_loss import run_batch
from espalier.memory.meter import peak_memory, release_free_memory, resident_memory
from espalier.train import checkpoint, schedules


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
    checkpoint_every: int = 0
    evaluate_every: int = 0
    padded: bool = False
    pad_token: int = 0
    in_backward: bool = False
    """Whether parameters are moved during the backward pass; then ``clip`` is 0."""
    resident_between: int = 0
    """Resident bytes above which free memory goes back to the system before a micro-batch; 0: never."""


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


def accumulate(
    model: nn.Module, batches: list[Batch], resident_between: int = 0, label_smoothing: float = 0.0
) -> tuple[float, int]:
    """Forward and backward of a step's micro-batches; returns the mean loss per target token, and their count."""
    total, loss = _targets_of(batches), 0.0
    for part in _passes(model, batches, total, resident_between, label_smoothing):
        part.backward()
        loss += float(part.detach())
        if not math.isfinite(loss):
            break
    return loss, total


def _targets_of(batches: list[Batch]) -> int:
    return max(1, sum(batch.target_count for batch in batches))


def _passes(model: nn.Module, batches: list[Batch], total: int, resident_between: int, label_smoothing: float) -> Iterator[torch.Tensor]:
    """Of each micro-batch, its share of the mean loss."""
    for batch in batches:
        if resident_between and resident_memory() > resident_between:
            release_free_memory()
        if batch.task:
            choose_task(model, batch.task)
        yield run_batch(model, batch, 1.0 / total, label_smoothing=label_smoothing)


def mean_loss(model: nn.Module, batches: list[Batch], settings: Settings) -> float:
    """The mean loss per target token of a step's micro-batches, of a model as it is now."""
    parts = _passes(model, batches, _targets_of(batches), settings.resident_between, settings.label_smoothing)
    return sum(float(part.detach()) for part in parts)


class _Gradients:
    """The usual step: all gradients, clipped together; then the optimizer."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: Settings, course: Course) -> None:
        self.model, self.parameters, self.optimizer, self.settings, self.course = model, parameters, optimizer, settings, course

    def step(self, batches: list[Batch], refuse: Callable[..., None]) -> tuple[float, float, int]:
        """Move the parameters once.

        Args:
            refuse: raises where a loss or a norm is not finite; takes the two, and advice that is not the usual one.

        Returns:
            The mean loss per target token, the norm of the gradient, and the target tokens.
        """
        loss, targets = accumulate(self.model, batches, self.settings.resident_between, self.settings.label_smoothing)
        if isinstance(penalty := self.course.penalty(), torch.Tensor) and math.isfinite(loss):
            penalty.backward()
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip or math.inf))
        refuse(loss, norm)
        self.course.before_step()
        self.optimizer.step()
        self.course.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, targets

    def close(self) -> None:
        """Training ends, or is broken off."""


class _DuringBackward(_Gradients):
    """Every parameter is moved as soon as its gradient is there."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.course.check_without_gradients("--update-in-backward")
        self._norms: dict[int, torch.Tensor] = {}
        self._mover = InBackward(self.parameters, self._move, self._hold)

    def _measure(self, some: list[nn.Parameter]) -> None:
        norms = torch._foreach_norm([p.grad for p in some if p.grad is not None])
        if not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all()):
            self._refuse(0.0, next(float(norm) for norm in norms if not math.isfinite(norm)), _MOVED)
        for parameter, norm in zip(some, norms, strict=True):
            self._norms[id(parameter)] = self._norms.get(id(parameter), 0.0) + norm

    def _move(self, some: list[nn.Parameter]) -> None:
        self._measure(some)
        self.optimizer.step()

    def _hold(self, parameter: nn.Parameter) -> bool:
        hold = getattr(self.optimizer, "hold", None)
        if hold is None or not hold(parameter):
            return False
        self._measure([parameter])
        return True

    def step(self, batches: list[Batch], refuse: Callable[..., None]) -> tuple[float, float, int]:
        total, loss = _targets_of(batches), 0.0
        self._norms.clear()
        self._refuse = refuse
        self.course.before_step()
        for number, part in enumerate(_passes(self.model, batches, total, self.settings.resident_between, self.settings.label_smoothing), 1):
            loss += float(part.detach())
            refuse(loss, 0.0)  # before anything of this step is moved
            self._mover.is_last = number == len(batches)
            part.backward()
        self._mover.finish()
        self.course.after_step()
        return loss, float(torch.linalg.vector_norm(torch.stack([norm.float() for norm in self._norms.values()]))), total

    def close(self) -> None:
        self._mover.__exit__(None, None, None)


class _Losses(_Gradients):
    """No gradients: an optimizer that evaluates the loss at several places and moves by that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.course.check_without_gradients("a zeroth-order optimizer", has_penalty=False)

    def step(self, batches: list[Batch], refuse: Callable[..., None]) -> tuple[float, float, int]:
        total, device = _targets_of(batches), next(iter(self.parameters.values())).device
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        @torch.no_grad()
        def loss_of() -> torch.Tensor:
            torch.set_rng_state(random[0])  # dropout is the same in all evaluations: they differ by where the parameters are
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], device)
            loss = torch.stack([part.detach() for part in _passes(self.model, batches, total, self.settings.resident_between, self.settings.label_smoothing)]).sum()
            return loss + self.course.penalty()

        self.course.before_step()
        loss = float(self.optimizer.step(loss_of))  # type: ignore[arg-type]
        norm = float(self.optimizer.slope)  # type: ignore[attr-defined]
        refuse(loss, norm)
        self.course.after_step()
        return loss, norm, total


_RATHER = "try a lower --learning-rate, or --dtype fp32"
_ADVICE = f"Nothing of this step was kept; {_RATHER}"
_MOVED = f"Parameters whose gradients came before it have moved, which no checkpoint holds; {_RATHER}"


def _first_not_finite(parameters: dict[str, nn.Parameter], gradients: bool) -> str | None:
    for name, parameter in parameters.items():
        tensor = parameter.grad if gradients else parameter
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _refuse_not_finite(
    step: int, begin: Cursor, batches: list[Batch], parameters: dict[str, nn.Parameter], loss: float, norm: float,
    advice: str = _ADVICE,
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
        raise NotFiniteError(f"stopped at step {step}: it made parameter {broken} infinite or NaN. {_ADVICE}")


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
    course.check()
    run.folder.mkdir(parents=True, exist_ok=True)
    model.train()
    kind = _Losses if getattr(optimizer, "zeroth_order", False) else _DuringBackward if settings.in_backward else _Gradients
    way = kind(model, parameters, optimizer, settings, course)
    with contextlib.closing(way), run.metrics.open("a", encoding="utf-8") as metrics:
        while state.step < settings.steps:
            began = time.perf_counter()
            step = state.step
            rate = settings.learning_rate * schedules.factor(
                settings.schedule, step, settings.steps, settings.warmup, settings.floor, settings.decay, settings.knee
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
            begin = dataclasses.replace(state.cursor)
            step_batches = order.batches(state.cursor, settings.batch_tokens, settings.micro_tokens, settings.padded, settings.pad_token)
            batches = [batch.to(device) for batch in step_batches]
            course.begin(step, rate, optimizer, functools.partial(mean_loss, model, batches, settings))
            refuse = functools.partial(_refuse_not_finite, step + 1, begin, batches, parameters)
            loss, norm, targets = way.step(batches, refuse)
            last = step + 1 == settings.steps
            kept = last or (settings.checkpoint_every > 0 and (step + 1) % settings.checkpoint_every == 0)
            if kept:
                _refuse_to_keep_not_finite(step + 1, parameters)
            seconds = time.perf_counter() - began
            tokens = sum(batch.tokens for batch in batches)
            state.step, state.tokens, state.seconds = step + 1, state.tokens + tokens, state.seconds + seconds
            record = Step(
                step + 1, loss, rate, norm, targets, tokens, tokens / seconds, resident_memory(), seconds, state.cursor.epoch
            )
            _write(metrics, dict(record.__dict__))
            hooks.on_step(record)
            if kept and settings.checkpoint_every:
                hooks.on_checkpoint(checkpoint.save(run.checkpoints, {**parameters, **course.kept()}, optimizer, state))
            if hooks.on_evaluate and settings.evaluate_every and state.step % settings.evaluate_every == 0 and not last:
                result = hooks.on_evaluate(state.step)
                _write(metrics, {"step": state.step, "peak_memory": peak_memory(), **result})
                model.train()
    course.finish()


def _write(metrics: IO[str], record: dict[str, Any]) -> None:
    metrics.write(json.dumps(record) + "\n")
    metrics.flush()
