"""Which task the batches of a live model are of, for methods that do something else for each."""

from __future__ import annotations

from torch import nn

from espalier.attach.attachment import attachments
from espalier.errors import EspalierError


def tasks_of(model: nn.Module) -> list[str]:
    """The names of the tasks that the deltas on a model know."""
    return list(dict.fromkeys(name for attached in attachments(model).values() for name in attached.method.task_names()))


def choose_task(model: nn.Module, task: str) -> None:
    """Let the forward passes that follow, and their backward passes, be of a task: all rows of a batch are of one.

    Raises:
        EspalierError: when a delta on the model has tasks, and none of this name, or none has any.
    """
    found = [attached for attached in attachments(model).values() if attached.method.task_names()]
    for attached in found:
        if task not in (known := attached.method.task_names()):
            raise EspalierError(f"the delta {attached.name!r} has no task {task!r}; it has: {', '.join(known)}")
    if not found:
        raise EspalierError(f"task is {task!r}, and no delta on the model has tasks")
    for attached in found:
        attached.task = task
        attached.method.choose(attached.pool, task)
