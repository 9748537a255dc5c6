"""What an adaptation method is: starting tensors for a parameter, and the form that they make now.

A method is a dataclass of hyperparameters with two functions, like a gradient transformation: ``start``
makes the tensors of one parameter, ``update`` says which form they make in this forward pass. A method
whose parameters share factors also has ``start_shared`` and ``prepare``, which is called once per forward
of the whole model, outside recomputed regions. One that decides something over all parameters before they
start (ranks, from the data's statistics) has ``survey``; one that changes in the course of a run has a few
of the functions of :class:`Course <espalier.attach.course.Course>`. Everything else (layers, saving,
merging, sharding, recomputation, compilation) comes with the form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from espalier.anatomy.target import Target
from espalier.delta.forms import Update
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream

Tensors = dict[str, torch.Tensor]
"""Name -> tensor; an ``nn.Parameter`` is trained, any other tensor is kept beside it unchanged."""


@dataclass(frozen=True)
class Wanted:
    """The statistics of the data that a method starts from (see ``calibrate``)."""

    statistics: str
    rank: int = 32
    """how many singular vectors"""
    tokens: int = 16384
    """how many tokens are looked at"""
    targets: str | None = None
    """of which parameters; default: those that the method is put on"""


@dataclass(frozen=True)
class Moment:
    """Where a run is: ``step`` of its ``steps`` (from 0) is under way, at this learning rate."""

    step: int
    steps: int
    learning_rate: float = 0.0


@dataclass(frozen=True)
class Renewed:
    """Places of one trained tensor of a part that from now on hold other numbers, and what is known of these.

    Args:
        part: the part.
        name: of the tensor.
        places: which, a mask of its shape; the same on every process.
        gradients, squares: means of the new numbers' gradients and of their squares, of the tensor's shape; ``None``: unknown.
        steps: over how many steps.
    """

    part: Any
    name: str
    places: torch.Tensor
    gradients: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    steps: int = 0


class Method:
    """What every method that ``attach`` takes has, whether it updates parameters or branches off (``attach/branch.py``)."""

    name: ClassVar[str]
    learning_rate: ClassVar[float] = 1e-4
    """Peak learning rate that ``tune`` takes when none is given."""
    size: ClassVar[str] = ""
    """The hyperparameter that sets how many numbers train; "" where none does."""
    targets: ClassVar[str]
    """Targets that ``attach`` takes when none are given."""
    needs: ClassVar[str] = ""
    """What it is for, where not every base will do: ``pruned``, a base with zeros; ``sources``, one with deltas that are given."""
    by_task: ClassVar[bool] = False
    """Whether every batch is of one of several tasks, which its hyperparameter ``tasks`` names, with commas."""

    def check(self) -> None:
        """Refuse hyperparameters out of range.

        Raises:
            EspalierError: naming the hyperparameter, its value and the range.
        """

    def wanted(self) -> Wanted | None:
        """The statistics that the method starts from."""
        return None

    def start_shared(self, targets: Sequence[Any], stream: Stream) -> Tensors:
        """Tensors that several targets read; owned once, at the model's root."""
        return {}

    def prepare(self, pool: Any, targets: Sequence[Any]) -> Mapping[str, Any]:
        """Context per name of a target, from the shared tensors (attributes of ``pool``)."""
        return {}

    def task_names(self) -> Sequence[str]:
        """The names of the tasks; none where batches are not of tasks."""
        return ()

    def choose(self, pool: Any, task: str) -> None:
        """Let the forward passes that follow be of a task, one of :meth:`task_names`; ``pool`` holds the shared tensors.

        Where there are several, a forward pass before this is refused.
        """

    def count(self, target: Any) -> int:
        """Trained numbers for one target: the planner's formula."""
        raise NotImplementedError

    def count_shared(self, targets: Sequence[Any]) -> int:
        """Trained numbers of the shared tensors that are no single target's part."""
        return 0

    # in the course of a run; ``parts`` are those of all parameters

    kept: ClassVar[tuple[str, ...]] = ()
    """Names of tensors of a part that are not trained, and that checkpoints hold: they change in a run, or were computed
    from the base (a decomposition, say), which another machine does to other bits."""

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        """Tensor name -> options of the optimizer for it; ``rate`` is a factor on the learning rate."""
        return {}

    def check_run(self, parts: Sequence[Any], steps: int) -> None:
        """Called before the first step of a run of so many.

        Raises:
            EspalierError: when what the method promises (a budget) cannot be reached in them.
        """

    def before_forward(self, parts: Sequence[Any], moment: Moment, measure: Callable[[], float] | None) -> None:
        """Called when a step begins, before :meth:`frozen`.

        Args:
            measure: gives the mean loss of the step's batch as the model is now, in evaluation mode and without gradients, the
                same on every process; ``None`` where the loop cannot.
        """

    def penalty(self, parts: Sequence[Any]) -> torch.Tensor | None:
        """What is added to each step's loss, 0-d."""
        return None

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, torch.Tensor | bool]:
        """Tensor name -> which of its entries do not move in this step: a mask that broadcasts, or ``True``.

        What is frozen keeps its bits, whatever momentum and decay the optimizer has, which sees a gradient of zero there, as
        clipping does; a tensor that is frozen whole gets none. Depends on the moment alone, or on what :meth:`before_forward` drew.
        """
        return {}

    needs_base: ClassVar[bool] = False
    """Whether a run reads the base's values even of parameters whose updates replace them."""
    state_policy: ClassVar[Literal["keep", "drop", "seed"]] = "keep"
    """What becomes of the optimizer's state of a tensor that is frozen whole, and of numbers that :meth:`reselect` gives away.

    ``keep``: nothing. ``drop``: it is forgotten, so that they begin anew. ``seed``: the same, but they begin with what
    :class:`Renewed` says, where the optimizer knows how.
    """

    reads_gradients: ClassVar[bool] = True
    """Whether :meth:`before_step` or :meth:`after_step` look at gradients: then the method does not go with ways of training
    that never have all of them (updates during the backward pass, zeroth-order optimizers); else the gradients may be absent."""

    def check_without_gradients(self, what: str, is_blind: bool = False) -> None:
        """Refuse a way of training, called ``what``, that never has all gradients of a step, where the method needs them.

        Args:
            is_blind: whether there are no gradients at all: then the losses have penalties in them.

        Raises:
            EspalierError: naming the method and why.
        """
        own = type(self)
        looks = own.reads_gradients and (own.before_step is not Method.before_step or own.after_step is not Method.after_step)
        if looks or (not is_blind and own.penalty is not Method.penalty):
            why = "looks at the gradients of a whole step" if looks else "adds a penalty to the loss of a whole step"
            raise EspalierError(f"{what} does not go with {self.name}, which {why}; leave it out, or take another method")

    def before_step(self, parts: Sequence[Any], moment: Moment) -> Any:
        """Called when gradients are there (but see :attr:`reads_gradients`), not yet clipped, and the optimizer has not moved anything."""

    def after_step(self, parts: Sequence[Any], moment: Moment, before: Any) -> None:
        """Called after the optimizer, with the gradients (clipped) still there, and with what :meth:`before_step` returned."""

    def reselect(self, parts: Sequence[Any], moment: Moment) -> Sequence[Renewed]:
        """Called after :meth:`after_step`: a support may change here. Says which places now hold other numbers than before."""
        return ()

    def finish(self, parts: Sequence[Any]) -> None:
        """Called after the last step.

        Raises:
            EspalierError: when what the method promised (a budget) was not reached.
        """

    def report(self, parts: Sequence[Any], steps: int) -> Mapping[str, Any]:
        """What the result of a run of so many steps says of the method, as JSON values by name."""
        return {}


class Adapter(Method):
    """Base of every method that updates parameters; fields of the subclass are its hyperparameters."""

    takes: ClassVar[str] = "matrices"
    """What :meth:`accepts` accepts, in words."""
    size: ClassVar[str] = "rank"
    surveys_ranks: ClassVar[bool] = False
    """Whether :meth:`survey` may give parameters other ranks than each other: :meth:`count` is then that of the average."""
    targets: ClassVar[str] = "linear"

    def accepts(self, target: Target) -> bool:
        """Whether the method can update this parameter; by default, any matrix."""
        return target.is_matrix

    def selected(self, targets: Sequence[Target], seed: int) -> Sequence[Target]:
        """Which of the parameters that were asked for train; by default all. The same on every process, and for the planner."""
        return targets

    def moving(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Which of the parameters that train move at a time, where :meth:`frozen` holds others whole; of several sets that do,
        one that takes the most memory. For the planner; by default all."""
        return targets

    def start(self, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        """The private tensors of one parameter.

        Args:
            target: the parameter, with its logical shape.
            weight: the base weight, logical shape (..., out, in); not to be kept.
            stream: random numbers named after the parameter.
        """
        raise NotImplementedError

    def survey(
        self, targets: Sequence[Target], weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor] | None
    ) -> Mapping[str, Any]:
        """What is decided over all parameters before any starts: a finding for each parameter's name.

        Args:
            weight: gives the base weight of a parameter, in its logical shape.
            statistic: gives a statistic by (name or site of a parameter, name of the statistic); ``None`` unless :meth:`wanted`.
        """
        return {}

    def start_from(self, finding: Any, target: Target, weight: torch.Tensor, stream: Stream) -> Tensors:
        """:meth:`start`, given what :meth:`survey` found; a tensor called ``gain`` takes the place of :meth:`gain`."""
        return self.start(target, weight, stream)

    def gain(self, target: Target) -> float:
        """What the update is multiplied by, such as alpha / rank."""
        return 1.0

    def bases(self, target: Target, stream: Stream) -> Any:
        """What the update of one parameter is made of that is no tensor, such as seeded matrices: made once, ``part.bases``.

        Args:
            stream: as that of ``start``.
        """
        return None

    def update(self, part: Any, context: Any) -> Update:
        """The update that the tensors make now.

        Args:
            part: has every tensor of ``start`` as an attribute, plus ``target``, ``gain`` (0-d tensor),
                ``base_dtype`` and ``bases``.
            context: what ``prepare`` returned for this parameter, or ``None``.
        """
        raise NotImplementedError

    def export(self, part: Any, pool: Any) -> Update:
        """The update in the form in which it is stored; by default the one that it makes now."""
        return self.update(part, None)

    def companions(self, target: Target) -> Sequence[str]:
        """Names of further parameters that the tensors of this one update too, as far as the model has them.

        Such a parameter is no target of its own: :meth:`accompany` makes its update.
        """
        return ()

    def accompany(self, part: Any, companion: Target) -> Update:
        """The update of a companion, of the tensors of the parameter that it goes with (``part``, as for :meth:`update`)."""
        raise NotImplementedError

    def start_bound(self, target: Target) -> float:
        """The largest magnitude that an entry of the update has at the start; by default 0: the start is the base.

        Infinite where the method makes the weight itself: the start is no base.
        """
        return 0.0

    def count(self, target: Target) -> int:
        """Trained numbers for one parameter (its part of the shared ones included): the planner's formula."""
        raise NotImplementedError
