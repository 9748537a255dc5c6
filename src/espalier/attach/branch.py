"""What a branch is: starting tensors for a site of the model, and the change that they make there now.

A branch is a change that is not an update of a parameter: a small module at a named site (``anatomy/site.py``). It is
a dataclass of hyperparameters with two functions: ``start`` makes the tensors of one site, ``branch`` says what they
change in this forward pass. How a forward pass reaches it depends on its place alone (``attach/places.py``).

Every branch declares the four fields of the unified view (He et al., arXiv:2110.04366), ``h <- h + change``: the
functional ``form`` of the change, its ``place``, its ``insertion`` (``sequential``: made from what the sublayer gives;
``parallel``: from what it is given) and its ``composition`` with h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.anatomy.site import Place, Site
from espalier.anatomy.target import Target
from espalier.attach.method import Method, Tensors, Wanted
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream


class Branch(Method):
    """Base of every method that puts branches on a model; fields of the subclass are its hyperparameters."""

    form: ClassVar[str]
    """The functional form of the change."""
    place: ClassVar[Place | str]
    """Where it acts: ``sublayer``, ``heads``, ``embedding`` or ``model``; several in a composition, joined by ``+``."""
    insertion: ClassVar[str] = "sequential"
    composition: ClassVar[str] = "h + change"
    starts_as_base: ClassVar[bool] = True
    """Whether the start changes nothing."""

    def at(self, site: Site) -> Branch:
        """The method that acts at a site: itself, but for a composition."""
        return self

    def accepts(self, site: Site) -> bool:
        """Whether the branch can be at this site; by default, at any of its place."""
        return site.place == self.place

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        """The private tensors of one site.

        Args:
            site: where, with its sizes.
            model: the whole model; not to be kept.
            stream: random numbers named after the site.
        """
        raise NotImplementedError

    def start_measured(
        self, site: Site, model: nn.Module, stream: Stream, weight: Callable[[Target], torch.Tensor], statistic: Callable[[str, str], torch.Tensor]
    ) -> Tensors:
        """:meth:`start`, where the method has :meth:`wanted` statistics.

        Args:
            weight: gives a parameter of the model, in its logical shape; not to be kept.
            statistic: gives a statistic by (name or site of a parameter, name of the statistic).
        """
        return self.start(site, model, stream)

    def gain(self, site: Site) -> float:
        """What the change is multiplied by."""
        return 1.0

    def tensors(self, part: Any) -> Tensors:
        """The tensors of this forward pass, from those that a site has; by default they themselves."""
        return {name: getattr(part, name) for name in part.names}

    def branch(self, part: Any, *inputs: Any) -> Any:
        """What the tensors do now; ``part`` has those of :meth:`tensors` as attributes (in the dtype of the inputs), and ``site``,
        ``context`` (what ``prepare`` returned for this site) and ``training``. By place:

        - ``sublayer``: gets x (..., width), the sublayer's input or output; returns the change, alike.
        - ``heads``: gets the queries (batch, heads, tokens, head_dim) as attention sees them; ``part`` also has ``scaling``
          and ``cap``, which attention's own logits go through, and ``wide``, the dtype that sums are made in. Returns what the branch adds to the numerator of attention
          (batch, heads, tokens, head_dim), to its denominator (batch, heads, tokens, 1), and the logarithm of the scale
          of both, a number or alike.
        - ``embedding``: gets nothing; returns the vectors (n, width) that every sequence begins with.
        - ``model``: gets the hidden states (batch, tokens, width) that the first block gets and every block gives, and the
          arguments of the model's forward by name, without the tokens; ``part`` also has ``machine`` and ``implementation``,
          that of the model's attention. Returns the change of the last hidden state. No gradient goes into the model.
        """
        raise NotImplementedError

    def machine(self, site: Site) -> nn.Module | None:
        """At ``model``: a module for :meth:`branch` to run on the tensors; its own parameters are thrown away."""
        return None

    def stored(self) -> Branch:
        """The method as which the tensors of :meth:`export` are loaded again; by default itself."""
        return self

    def export(self, part: Any, pool: Any) -> Tensors:
        """The tensors of a site that are stored; by default all that ``start`` made."""
        return {name: getattr(part, name) for name in part.names}

    def export_shared(self, pool: Any) -> Tensors:
        """The shared tensors that are stored; by default all."""
        return {name: getattr(pool, name) for name in pool.names}

    def positions(self) -> int:
        """How many positions it takes in front of every sequence."""
        return 0

    def count(self, site: Site) -> int:
        """Trained numbers for one site: the planner's formula."""
        raise NotImplementedError


class Composed(Branch):
    """A method that is made of others, each at its own sites.

    In the course of a run, each of them is called for its own parts, as it is when it stands alone (``attach/course.py``);
    what is asked of the method as a whole goes from here to all of them. They see their own sites and shared tensors only.
    One that is stored as another method (:meth:`Branch.stored`) needs a composition that says so too.
    """

    _made: tuple[dict[str, Any], tuple[Branch, ...]] | None = None

    def methods(self) -> Sequence[Branch]:
        """The methods that it is made of, made anew; at a site that several accept, the first is."""
        raise NotImplementedError

    @property
    def made(self) -> tuple[Branch, ...]:
        """:meth:`methods`, made once for these options: they may remember things."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        if self._made is None or self._made[0] != options:
            self._made = (options, tuple(self.methods()))
        return self._made[1]

    def at(self, site: Site) -> Branch:
        return next(method for method in self.made if method.accepts(site)).at(site)

    def accepts(self, site: Site) -> bool:
        return any(method.accepts(site) for method in self.made)

    def wanted(self) -> Wanted | None:
        found = {wanted for method in self.made if (wanted := method.wanted()) is not None}
        if len(found) > 1:
            raise EspalierError(f"{self.name} is made of methods that start from different statistics: {', '.join(sorted(w.statistics for w in found))}")
        return next(iter(found), None)

    def _each(self, sites: Sequence[Site]) -> list[tuple[Branch, list[Site]]]:
        owners = {site.name: next(method for method in self.made if method.accepts(site)) for site in sites}
        return [(method, [site for site in sites if owners[site.name] is method]) for method in self.made]

    def start_shared(self, sites: Sequence[Site], stream: Stream) -> Tensors:
        tensors: Tensors = {}
        self._shared: dict[int, tuple[str, ...]] = {}
        for number, (method, own) in enumerate(self._each(sites)):
            shared = method.start_shared(own, stream) if own else {}
            if both := shared.keys() & tensors.keys():
                raise EspalierError(f"two of the methods that {self.name} is made of share a tensor called {min(both)!r}; one must call it otherwise")
            tensors |= shared
            self._shared[number] = tuple(shared)
        return tensors

    def _shares(self, pool: Any) -> list[tuple[Branch, _Share]]:
        """What each method sees of the shared tensors."""
        return [(method, _Share(pool, self._shared[number], own)) for number, (method, own) in enumerate(self._each(pool.targets))]

    def prepare(self, pool: Any, sites: Sequence[Site]) -> Mapping[str, Any]:
        found: dict[str, Any] = dict.fromkeys(site.name for site in sites)
        for method, share in self._shares(pool):
            if share.names:
                found |= method.prepare(share, share.targets)
        return found

    def export(self, part: Any, pool: Any) -> Tensors:
        share = None
        if pool is not None:
            share = next(share for _, share in self._shares(pool) if part.site in share.targets)
        return self.at(part.site).export(part, share)

    def export_shared(self, pool: Any) -> Tensors:
        return {name: tensor for method, share in self._shares(pool) for name, tensor in method.export_shared(share).items()}

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        """Of the shared tensors; a part's are those of its own method."""
        return {name: options for method in self.made for name, options in method.optimizer_options().items()}

    def check_without_gradients(self, what: str, is_blind: bool = False) -> None:
        for method in self.made:
            method.check_without_gradients(what, is_blind)

    def task_names(self) -> Sequence[str]:
        return list(dict.fromkeys(name for method in self.made for name in method.task_names()))

    def choose(self, pool: Any, task: str) -> None:
        shares = self._shares(pool) if pool is not None else [(method, None) for method in self.made]
        for method, share in shares:
            if task in method.task_names():
                method.choose(share, task)

    def positions(self) -> int:
        return sum(method.positions() for method in self.made)

    def count(self, site: Site) -> int:
        return self.at(site).count(site)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return sum(method.count_shared(own) for method, own in self._each(sites) if own)


class _Share:
    """The shared tensors of one of several methods, and its sites."""

    def __init__(self, pool: Any, names: tuple[str, ...], targets: list[Site]) -> None:
        self.names, self.targets, self._pool = names, tuple(targets), pool

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"no shared tensor of the method is called {name!r}")
        return getattr(self._pool, name)
