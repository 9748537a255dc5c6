"""The contract of compression methods (``compress/``), and running one over a delta, a parameter at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from espalier.delta.fit import Source, densify, relative_error, require_finite
from espalier.delta.forms import Replace, Update
from espalier.delta.store import Delta, Layout
from espalier.delta.trained import Start
from espalier.delta.trained import recorded_start as recorded
from espalier.errors import EspalierError

Weights = Callable[[str, Layout, tuple[int, ...]], torch.Tensor]
"""From a parameter's name, layout and shape to the base's weight, in its logical shape."""
Score = Callable[[Mapping[str, Update]], float]
"""From updates to what is to be low, such as a loss on validation data."""


@dataclasses.dataclass
class Whole:
    """The delta that is being compressed, as methods see it.

    Args:
        seed: of random numbers, which are also of the parameter's name.
        weights: reads the base; ``None`` where there is none at hand.
    """

    delta: Delta
    seed: int = 0
    weights: Weights | None = None

    def weight(self, name: str) -> torch.Tensor | None:
        """The base's weight of a parameter, or ``None`` without a base."""
        return self.weights(name, self.delta.layouts[name], self.delta.updates[name].shape) if self.weights else None

    def independent(self, name: str, update: Update) -> Source:
        """The update, made dense where it depends on the base.

        Raises:
            EspalierError: when it does and there is no base.
        """
        return densify(update, self.weight(name)) if update.depends_on_base else update

    def start(self, name: str, update: Update) -> Start | None:
        """Where the A of low-rank factors started, if the delta records it."""
        return recorded(self.delta.manifest, name, update)

    def compressible(self) -> list[str]:
        """Parameters whose updates are numbers that may change: no integers, no tensors that the base does not have."""
        return [n for n, u in self.delta.updates.items() if u.dtype.is_floating_point and not self.delta.layouts[n].dtype]


class Compressor:
    """A way to make updates smaller; a method is a dataclass of its options (see ``registry.py``)."""

    name: ClassVar[str]
    role: ClassVar[str]
    ids: ClassVar[tuple[int, ...]]
    paper: ClassVar[str]

    def check(self) -> None:
        """Refuse options out of range."""

    def candidates(self) -> tuple[Mapping[str, Any], ...]:
        """Options among which validation data choose; none by default."""
        return ()

    def begin(self, whole: Whole) -> Any:
        """What a pass over the whole delta finds out; given to every :meth:`compress`, which then go in order."""
        return None

    def compress(self, name: str, update: Update, whole: Whole, state: Any) -> Update | None:
        """The smaller update of one parameter, or ``None`` to leave the parameter as the base has it."""
        raise NotImplementedError


@dataclasses.dataclass
class Outcome:
    """What a method made of one parameter: forms, bytes and the relative error (``None`` where the base is needed)."""

    name: str
    was: str
    form: str
    bytes_before: int
    bytes: int
    error: float | None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """What goes wrong inside, with ``what`` before it; where memory ran out, an error that says so.

    Raises:
        EspalierError: for any other, and for a failed allocation.
    """
    try:
        yield
    except EspalierError as problem:
        raise EspalierError(f"{what}: {problem}") from problem
    except (MemoryError, RuntimeError) as problem:
        if not isinstance(problem, MemoryError) and "allocate" not in str(problem):
            raise
        raise EspalierError(f"{what}: there is not enough memory for it ({str(problem).splitlines()[0]})") from problem


def compress(
    method: Compressor, whole: Whole, keep: Callable[[str, Update], Update] = lambda name, update: update,
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[dict[str, Update], list[Outcome]]:
    """Every update of a delta, compressed by a method, and what became of each.

    Args:
        keep: is given each compressed update and gives one to remember, perhaps out of memory.

    Raises:
        EspalierError: naming the parameter, when one cannot be compressed.
    """
    possible = set(whole.compressible())
    for name in possible:
        with naming(f"{method.name} of {name}"):
            require_finite(whole.delta.updates[name])
    state = method.begin(whole)
    made: dict[str, Update] = {}
    outcomes = []
    for done, (name, update) in enumerate(whole.delta.updates.items()):
        with naming(f"{method.name} of {name}"):
            smaller = method.compress(name, update, whole, state) if name in possible else update
            error = None if smaller is None else _error(smaller, update, whole, name)
        if smaller is not None:
            made[name] = keep(name, smaller)
        outcomes.append(Outcome(name, update.form, smaller.form if smaller else "none", update.nbytes, smaller.nbytes if smaller else 0, error))
        progress(done + 1)
    return made, outcomes


def choose(method: Compressor, whole: Whole, score: Score) -> tuple[Compressor, list[dict[str, Any]]]:
    """The method with those of its candidates' options that score lowest, and every candidate's ``score``.

    Raises:
        EspalierError: when the method leaves nothing to choose.
    """
    if not (candidates := method.candidates()):
        raise EspalierError(f"{method.name} has nothing that validation data could choose; leave --data out")
    tried = []
    for options in candidates:
        candidate = dataclasses.replace(method, **options)  # type: ignore[type-var]
        tried.append({**options, "score": score(compress(candidate, whole)[0])})  # no name holds one while the next is made
    best = min(range(len(tried)), key=lambda i: tried[i]["score"])
    return dataclasses.replace(method, **candidates[best]), tried  # type: ignore[type-var]


def _error(smaller: Update, update: Update, whole: Whole, name: str) -> float | None:
    if smaller is update:
        return 0.0
    if (smaller.depends_on_base or update.depends_on_base) and whole.weights is None:
        return None
    if isinstance(update, Replace) and not update.values.is_floating_point():
        return None
    return relative_error(smaller, update, whole.weight(name) if smaller.depends_on_base or update.depends_on_base else None)
