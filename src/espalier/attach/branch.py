"""What a branch is: starting tensors for a site of the model, and the change that they make there now.

A branch is a change that is not an update of a parameter: a small module at a named site (``anatomy/site.py``). It is
a dataclass of hyperparameters with two functions: ``start`` makes the tensors of one site, ``branch`` says what they
change in this forward pass. How a forward pass reaches it depends on its place alone (``attach/places.py``).

Every branch declares the four fields of the unified view (He et al., arXiv:2110.04366), ``h <- h + change``: the
functional ``form`` of the change, its ``place``, its ``insertion`` (``sequential``: made from what the sublayer gives;
``parallel``: from what it is given) and its ``composition`` with h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from espalier.anatomy.site import Place, Site
from espalier.attach.method import Method, Tensors
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

    def gain(self, site: Site) -> float:
        """What the change is multiplied by."""
        return 1.0

    def branch(self, part: Any, *inputs: Any) -> Any:
        """What the tensors do now; ``part`` has those of ``start`` as attributes (in the dtype of the inputs), and ``site``,
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
    """A method that is made of others, each at its own place."""

    def methods(self) -> Sequence[Branch]:
        """The methods that it is made of."""
        raise NotImplementedError

    def at(self, site: Site) -> Branch:
        return next(method for method in self.methods() if method.accepts(site))

    def accepts(self, site: Site) -> bool:
        return any(method.accepts(site) for method in self.methods())

    def _each(self, sites: Sequence[Site]) -> list[tuple[Branch, list[Site]]]:
        return [(method, [site for site in sites if method.accepts(site)]) for method in self.methods()]

    def start_shared(self, sites: Sequence[Site], stream: Stream) -> Tensors:
        return {name: t for method, own in self._each(sites) for name, t in method.start_shared(own, stream).items()}

    def prepare(self, pool: Any, sites: Sequence[Site]) -> Mapping[str, Any]:
        return {name: context for method, own in self._each(sites) for name, context in method.prepare(pool, own).items()}

    def positions(self) -> int:
        return sum(method.positions() for method in self.methods())

    def count(self, site: Site) -> int:
        return self.at(site).count(site)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return sum(method.count_shared(own) for method, own in self._each(sites))
