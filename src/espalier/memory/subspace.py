"""The template of optimizers whose state is of a low-dimensional part of the gradient (``optim/galore.py``, ...).

Four things make such an optimizer: how a matrix's gradient G is split into a part R = down(G), which has state, and a
rest S = G - up(R), which has none; what the rule that owns the state makes of R; what is done with S; and when the
subspace is chosen anew. ``w <- w - lr (scale up(rule(R)) + rest(S) + decay w)``.

State of a matrix beside the rule's slots, which have the shape of R: ``basis``, how many steps it has ``taken``, and how many subspaces
were ``drawn``, which outlasts a state that is forgotten: what is drawn at random next is another one.
Parameters that are not split (embeddings, head, norms) go by the rule as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from espalier.anatomy.parameters import BLOCK
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.kernels.sharded import like, local, whole
from espalier.memory import stored_state
from espalier.memory.rule import BUCKET, Part, Rule, Ruled, Shape, Tensors

Kind = Literal["right", "left", "columns", "rows", "entries", "whole"]
"""Where R is: G P, P^T G, some columns, rows or entries of G, or all of it or nothing."""
Choice = Literal["svd", "randomized", "qr", "random"]
"""How a projector P is chosen: the leading singular vectors of G, nearly these by a randomized sketch or from the last P, or at random."""


def down(kind: Kind, gradient: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part R of a gradient (out, in) that has state."""
    match kind:
        case "right":
            return gradient @ basis
        case "left":
            return basis.T @ gradient
        case "columns":
            return gradient[:, basis]
        case "rows":
            return gradient[basis]
        case "entries":
            return gradient.flatten()[basis]
        case "whole":
            return gradient if len(basis) else gradient[:0]


def up(kind: Kind, reduced: torch.Tensor, basis: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A part R as a matrix (out, in) of the gradient's shape."""
    if kind == "right":
        return reduced @ basis.T
    if kind == "left":
        return basis @ reduced
    made = reduced.new_zeros(shape)
    match kind:
        case "columns":
            made[:, basis] = reduced
        case "rows":
            made[basis] = reduced
        case "entries":
            made.view(-1)[basis] = reduced
        case "whole":
            made[: len(reduced)] = reduced
    return made


def reduced_shape(kind: Kind, shape: Shape, size: int) -> Shape:
    """The shape of R for a rank or a number of columns, rows or entries."""
    rows, columns = shape
    return {"right": (rows, size), "columns": (rows, size), "left": (size, columns), "rows": (size, columns), "entries": (size,), "whole": shape}[kind]


def leading(matrix: torch.Tensor, rank: int, choice: Choice, stream: Stream, last: torch.Tensor | None = None) -> torch.Tensor:
    """An orthonormal basis (columns, r) of the right singular space of a matrix (rows, columns), or a random one.

    Signs are such that the largest entry of each vector is positive. The randomized one is that of Halko et al.
    (arXiv:0909.4061), with 8 vectors more than are kept and two power iterations. ``qr`` is one step of orthogonal iteration from the
    ``last`` basis: two products and a QR decomposition; the first is the randomized one.
    """
    columns = matrix.shape[1]
    if choice == "svd":
        try:
            found = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank].T
            return _signed(found)
        except RuntimeError:  # it did not converge: the randomized one needs no convergence
            choice = "randomized"
    if choice == "random":
        return torch.linalg.qr(stream.gaussian(columns, rank, device=matrix.device)).Q
    if choice == "qr" and last is not None:
        return _signed(torch.linalg.qr(matrix.T @ (matrix @ last)).Q)
    more = min(rank + 8, *matrix.shape)
    sketch = torch.linalg.qr(matrix.T @ stream.gaussian(matrix.shape[0], more, device=matrix.device)).Q
    for _ in range(2):
        sketch = torch.linalg.qr(matrix.T @ (matrix @ sketch)).Q
    turned = torch.linalg.svd(matrix @ sketch, full_matrices=False).Vh
    return _signed((sketch @ turned.T)[:, :rank])


def _signed(vectors: torch.Tensor) -> torch.Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).contiguous()


class LowDimensional(Rule):
    """An optimizer by the template. Subclasses say what is not as it is here."""

    scales_as = None
    rule: str = "adamw"
    rank: int = 128
    least_rank: ClassVar[int] = 1
    every: int = 200
    scale: float = 1.0
    choice: Choice = "svd"
    moments: Literal["keep", "reset", "rotate"] = "keep"
    """what becomes of the slots when a subspace is chosen anew; rotated is only what is signed, and the rest kept"""
    staggered: bool = True

    def check(self) -> None:
        super().check()
        at_least("rank", self.rank, self.least_rank)
        at_least("every", self.every, 1)
        if not self.scale > 0:
            raise EspalierError(f"scale is {self.scale}; it must be more than 0: what is in the subspace would not move, or move uphill")
        self.inner = self.standing_on(self.rule)

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[int]) -> Tensors:
        return self.inner.directions(gradients, state, steps)

    def kind(self, shape: Shape) -> Kind:
        """How a matrix (out, in) is split. Default: by a projector on its shorter side."""
        return "right" if shape[0] >= shape[1] else "left"

    def size(self, shape: Shape) -> int:
        """The rank of the projector, or the number of columns, rows or entries. Default: ``rank``, as far as there is room."""
        return min(self.rank, *shape)

    def splits(self, name: str, shape: Shape) -> bool:
        """Whether a parameter is split: the matrices of the blocks, where a projector makes them any smaller."""
        if len(shape) != 2 or BLOCK.search(name) is None:
            return False
        return self.kind(shape) not in ("right", "left") or self.size(shape) < min(shape)

    def basis(self, gradient: torch.Tensor, stream: Stream, period: int, place: tuple[int, int], last: torch.Tensor | None) -> torch.Tensor:
        """The subspace for the next steps, by the gradient (out, in) of this one.

        Args:
            stream: random numbers of this matrix and step.
            period: how often one was chosen before.
            place: which matrix it is, and of how many.
            last: the one that is left, if there is one.
        """
        kind, size = self.kind(tuple(gradient.shape)), self.size(tuple(gradient.shape))
        if kind in ("right", "left"):
            return leading(gradient if kind == "right" else gradient.T, size, self.choice, stream, last)
        total = {"columns": gradient.shape[1], "rows": gradient.shape[0]}.get(kind, gradient.numel())
        return stream.choice(total, size).to(gradient.device)

    def preconditioned(self, reduced: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the rule sees of R. Default: itself."""
        return reduced

    has_rest = False
    """whether anything is done with S"""

    copies: ClassVar[int] = 1
    """how many tensors of a matrix's size, about, are worked with beside the directions, where nothing is done with S"""

    def adds_up(self) -> bool:
        """Whether parts of a gradient may be summed as what is seen of them: the subspace does not depend on the gradient, and
        nothing is done with the rest."""
        return self.choice == "random" and not self.has_rest

    def rest(
        self, rest: torch.Tensor, reduced: torch.Tensor, direction: torch.Tensor, kind: Kind, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """What S adds to the direction: (out, in).

        Args:
            rest: S, (out, in).
            reduced, direction: R and what the rule made of it.
        """
        return rest

    def forget(self, state: dict[str, torch.Tensor]) -> None:
        """The subspace is another one: what else is kept of the old one goes."""

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        return Projected(self, self._groups(parameters), learning_rate)

    def state_bytes(self, shapes: Mapping[str, Shape]) -> int:
        total = 0
        for name, shape in shapes.items():
            if not self.splits(name, shape):
                total += super().state_bytes({name: shape})
                continue
            kind, size = self.kind(shape), self.size(shape)
            numel = math.prod(reduced_shape(kind, shape, size))
            total += sum(stored_state.bytes_of(numel, self.state) for _ in self.slots)
            total += {"right": 4 * shape[1] * size, "left": 4 * shape[0] * size, "whole": 0}.get(kind, 8 * size) + self.more_bytes(shape, numel)
        return total

    def summed_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of the sums of gradients between micro-batches, where parameters are moved during the backward pass and parts :meth:`adds_up`."""
        found = {name: reduced_shape(self.kind(shape), shape, self.size(shape)) if self.splits(name, shape) else shape for name, shape in shapes.items()}
        return 4 * sum(map(math.prod, found.values()))

    def step_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of a moment: the directions of a bucket, what one matrix is worked out in, or the choice of its subspace."""
        split = [shape for name, shape in shapes.items() if self.splits(name, shape)]
        if not split:
            return super().step_bytes(shapes)
        largest = max(split, key=math.prod)
        numbers, short = math.prod(largest), min(largest)
        bucket = max(numbers, min(BUCKET, sum(math.prod(shape) for shape in split)))
        choosing = 4 * (3 * numbers + 4 * short**2) if self.choice == "svd" and self.kind(largest) in ("right", "left") else 0
        moving = 4 * bucket + 4 * numbers * (4 if self.has_rest else self.copies)
        return max(choosing, moving, super().step_bytes({name: shape for name, shape in shapes.items() if not self.splits(name, shape)}))

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        super().check_shapes(shapes)
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and BLOCK.search(name)}
        if not matrices:
            raise EspalierError(
                f"{self.name} is for the matrices of a model's blocks, and none trains; take --optimizer {self.rule}, or another method or --targets"
            )
        if not any(self.splits(name, shape) for name, shape in matrices.items()):
            longest = max(min(shape) for shape in matrices.values())
            raise EspalierError(
                f"{self.name} projects to rank {self.rank}, and the shorter sides of all {len(matrices)} matrices that train have at most {longest}: "
                f"it would be {self.rule}; take a lower rank (--optimizer-rank where the method has one too), or --optimizer {self.rule}"
            )

    def more_bytes(self, shape: Shape, reduced: int) -> int:
        """Bytes of what else is kept of a matrix of which so many numbers are seen by the rule. Default: nothing."""
        return 0


@dataclass
class OnProjector(LowDimensional):
    """What optimizers with a projector for each matrix have as options: those of GaLore, with its defaults."""

    rank: int = 128
    """r, at least 1; no more than the shorter side"""
    every: int = 200
    """steps between choices of P"""
    scale: float = 0.25
    """of the step in the subspace"""
    choice: Choice = "svd"
    """P by the singular value decomposition, by a randomized sketch of it, by a QR step from the last P, or at random"""
    moments: Literal["keep", "reset", "rotate"] = "keep"
    """what becomes of the moments when P changes; rotate: the mean is expressed in the new P"""
    staggered: bool = True
    """choose one matrix's P after the other's, so that no step waits for all"""
    rule: str = "adamw"
    """the optimizer that has the state"""
    beta1: float = 0.9
    """decay of the mean, in [0, 1)"""
    beta2: float = 0.999
    """decay of the mean square, in [0, 1)"""
    epsilon: float = 1e-6
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""


class Projected(Ruled):
    """A low-dimensional rule as an optimizer of torch."""

    rule: LowDimensional

    def __init__(self, rule: LowDimensional, groups: Sequence[tuple[Mapping[str, torch.nn.Parameter], float]], learning_rate: float) -> None:
        super().__init__(rule, groups, learning_rate)
        split = [name for some, _ in groups for name, p in some.items() if rule.splits(name, tuple(p.shape))]
        self.offsets = {name: place * rule.every // len(split) if rule.staggered else 0 for place, name in enumerate(sorted(split))}
        """When in a period the subspace of a matrix is chosen anew: one after the other, so that no step waits for all."""
        self._held: dict[str, torch.Tensor] = {}
        """What there is of R so far, of gradients that come in parts."""
        self._split: dict[str, tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor, Kind]] = {}

    def _parts(self, parameter: torch.nn.Parameter) -> Iterator[tuple[torch.Tensor, Part]]:
        name, rule = self.names[id(parameter)], self.rule
        if name not in self.offsets:
            yield from super()._parts(parameter)
            return
        gradient = self._gradient(parameter)
        state, kind, held = self._opened(parameter, gradient), rule.kind(tuple(parameter.shape)), self._held.pop(name, None)
        reduced = down(kind, gradient, state["basis"])
        if held is not None:
            reduced += held
        self._split[name] = (parameter, gradient, reduced, kind)
        seen = rule.preconditioned(reduced, state).reshape(-1)
        yield local(parameter), Part(name, state, len(seen), len(seen), 0, seen)

    def _directions(self, parts: list[Part]) -> Tensors:
        directions = super()._directions(parts)
        return [self._back(d, *self._split.pop(p.name)) if p.name in self._split else d for p, d in zip(parts, directions, strict=True)]

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What is split: (out, in), float32."""
        assert parameter.grad is not None
        return whole(parameter.grad).float()

    def _opened(self, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a split parameter in the step that is under way: with its subspace."""
        name = self.names[id(parameter)]
        if name in self._held:
            return self.state[parameter]
        state = self._begun(parameter)
        self._refresh(name, gradient, state, self.rule.kind(tuple(parameter.shape)))
        return state

    def hold(self, parameter: torch.nn.Parameter) -> bool:
        name = self.names[id(parameter)]
        if name not in self.offsets or not self.rule.adds_up():
            return False
        gradient = self._gradient(parameter)
        reduced = down(self.rule.kind(tuple(parameter.shape)), gradient, self._opened(parameter, gradient)["basis"])
        self._held[name] = self._held[name].add_(reduced) if name in self._held else reduced.clone()
        return True

    def _refresh(self, name: str, gradient: torch.Tensor, state: dict[str, torch.Tensor], kind: Kind) -> None:
        """Choose the subspace anew when it is time, and say what becomes of the slots."""
        rule, taken = self.rule, int(state.get("taken", 0))
        state["taken"] = torch.tensor(float(taken + 1))
        if "basis" in state and taken % rule.every != self.offsets[name]:
            return
        old = state.get("basis")
        place, drawn = (list(self.offsets).index(name), len(self.offsets)), int(state.get("drawn", 0))
        state["drawn"] = torch.tensor(float(drawn + 1))
        state["basis"] = rule.basis(gradient, Stream(rule.seed, f"subspace of {name}").at(drawn * gradient.numel()), drawn, place, old)
        if old is None:
            return
        rule.forget(state)
        if rule.moments == "reset":
            for slot in rule.slots:
                state.pop(slot, None), state.pop(f"{slot}_scale", None)
            state["step"] = torch.ones(())
        elif rule.moments == "rotate" and kind in ("right", "left"):
            turn = old.T @ state["basis"]
            shape = reduced_shape(kind, tuple(gradient.shape), old.shape[1])
            for slot, signed in rule.slots.items():
                if signed and slot in state:
                    part = Part(f"turned {name}", state, math.prod(shape), math.prod(shape), 0, gradient.new_empty(math.prod(shape)))
                    numbers = self._load(part, slot, signed).view(shape)
                    turned = numbers @ turn if kind == "right" else turn.T @ numbers
                    numbers.copy_(turned)
                    self._store(part, slot, signed, numbers.view(-1))

    def _back(self, direction: torch.Tensor, parameter: torch.nn.Parameter, gradient: torch.Tensor, reduced: torch.Tensor, kind: Kind) -> torch.Tensor:
        """The direction of a whole matrix, of which this process takes its own."""
        rule, state, shape = self.rule, self.state[parameter], tuple(gradient.shape)
        direction = direction.view(reduced.shape)
        made = up(kind, direction, state["basis"], shape) * rule.scale
        if rule.has_rest:
            made += rule.rest(gradient - up(kind, reduced, state["basis"], shape), reduced, direction, kind, state)
        return local(like(parameter, made))
