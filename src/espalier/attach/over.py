"""A method over another one: it decides when, or where, what the other one makes is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from espalier import registry
from espalier.attach.method import Adapter
from espalier.errors import EspalierError

_WHOLE = (
    "wanted", "start_shared", "prepare", "task_names", "choose", "count", "count_shared", "optimizer_options", "check_run", "penalty",
    "before_forward", "frozen", "before_step", "after_step", "reselect", "report", "finish", "check_without_gradients", "accepts", "selected", "moving", "start", "survey", "start_from", "gain",
    "bases", "update", "export", "companions", "accompany", "start_bound",
)  # fmt: skip
_FACTS = ("kept", "state_policy", "reads_gradients", "takes", "surveys_ranks", "by_task", "needs", "needs_base")


class Over(Adapter):
    """Does what the method that its option ``inner`` names does, but for what a subclass does otherwise (calling ``super()``).

    The inner method has those hyperparameters that ``shared`` names (see :func:`espalier.registry.make_below`). It is stored as its forms
    are: who loads the delta need not know of what was over it.
    """

    inner: str
    shared: ClassVar[tuple[str, ...]] = ()
    _made: tuple[dict[str, Any], Adapter] | None = None

    @property
    def below(self) -> Adapter:
        """The inner method, made once for these options: it may remember things.

        Raises:
            EspalierError: when there is none of that name, or it is itself over another one.
        """

        def options() -> dict[str, Any]:
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}

        if self._made is None or self._made[0] != options():
            if issubclass(registry.load(registry.find(self.inner, "adapter")), Over):
                raise EspalierError(f"inner is {self.inner!r}, which is itself over another method; give that one")
            made = registry.make_below(self, self.inner, "adapter", "inner", self.shared)
            self._made = (options(), made)
        return self._made[1]


def _asks(name: str) -> Callable[..., Any]:
    def ask(self: Over, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.below, name)(*args, **kwargs)

    return ask


def _fact(name: str) -> property:
    def fact(self: Over) -> Any:
        return getattr(self.below, name)

    return property(fact)


for _name in _WHOLE:
    setattr(Over, _name, _asks(_name))
for _name in _FACTS:
    setattr(Over, _name, _fact(_name))
