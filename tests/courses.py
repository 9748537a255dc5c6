"""Running a course by hand on a tiny model, for tests of methods that change while they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import tokens

from espalier.attach.attachment import trainable_parameters
from espalier.attach.course import Course
from espalier.memory.joined_optimizer import build


def run(
    model: torch.nn.Module, steps: int, watch: Callable[[int], None] = lambda step: None, *, optimizer: Any = None, learning_rate: float = 0.01, finish: bool = True
) -> Course:
    """Train for some steps on random tokens as the loop does; ``watch`` is called after each."""
    course = Course(model, steps)
    course.check()
    make = optimizer or (lambda parameters, rate: torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.1))
    made = build(make, trainable_parameters(model), learning_rate, course.optimizer_options())
    for step in range(steps):
        x = tokens(seed=step)
        course.begin(step, learning_rate, made, lambda x=x: float(model(x, labels=x).loss))
        loss = model(x, labels=x).loss + course.penalty()
        loss.backward()
        course.before_step()
        made.step()
        course.after_step()
        made.zero_grad()
        watch(step)
    if finish:
        course.finish()
    return course
