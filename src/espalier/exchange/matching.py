"""Matching: the permutation of one model's units that lines them up with another's, by weights or by activations.

Weight matching maximises ``sum_t <A_t, P B_t>`` over all parameters t by coordinate descent (Git Re-Basin,
arXiv:2209.04836, algorithm 1; studied in arXiv:2402.04051): one set of units after the other, in an order drawn by seed,
each solved exactly as a linear assignment with the others held, until a whole sweep gains nothing. Attention and experts are
solved as what they are, sets within sets: whether two groups of heads fit is known once their heads and value dimensions
are lined up, so every pair of groups is lined up first. Activation matching maximises the correlation of what the units of
both models do on the same text; there no set depends on another, and one sweep is all.

The models are in memory, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import Coupling, Member, anatomy, logical_tensors, permute
from espalier.anatomy.symmetry import Experts, Heads, Symmetries, symmetries
from espalier.calibrate.pair import Text, moments, residual_correlation
from espalier.delta.forms import Permute, Replace, Update
from espalier.delta.store import Layout
from espalier.errors import EspalierError

Tensors = Mapping[str, torch.Tensor]
SWEEPS = 100
_NOISE = 1e-6
"""A gain below this share of the sum of all absolute similarities of the units is rounding, and no gain."""


def assign(similarity: torch.Tensor) -> tuple[list[int], float]:
    """The assignment with the largest sum of similarities: for each row (a unit of A) a column (of B), and that sum.

    Args:
        similarity: (units, units).

    Raises:
        EspalierError: when a similarity is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    table = similarity.double().cpu().numpy()
    if not np.isfinite(table).all():
        raise EspalierError("the similarity of two units is not finite; are the models' numbers finite, and not too large for float32?")
    _, columns = linear_sum_assignment(table, maximize=True)
    return columns.tolist(), float(table[np.arange(len(table)), columns].sum())


def units_of(tensors: Tensors, member: Member, units: int) -> torch.Tensor:
    """What belongs to each unit of one member: (units, width, everything else)."""
    tensor = tensors[member.name] if member.expert is None else tensors[member.name][member.expert]
    taken = tensor.index_select(member.axis, member.indices(units).flatten().to(tensor.device))
    return taken.movedim(member.axis, 0).reshape(units, member.width, -1)


def _products(a: Tensors, b: Tensors, members: Sequence[Member], units: int) -> torch.Tensor:
    """Inner products of every unit of A with every unit of B, (units, units)."""
    total = torch.zeros(units, units)
    for member in members:
        total += units_of(a, member, units).flatten(1) @ units_of(b, member, units).flatten(1).T
    return total


def _products_within(a: Tensors, b: Tensors, members: Sequence[Member], units: int, size: int) -> torch.Tensor:
    """Inner products of index d of unit i of A with index e of unit j of B, (units, units, size, size)."""
    total = torch.zeros(units * size, units * size)
    for member in members:
        one, other = (units_of(side, member, units).flatten(0, 1) for side in (a, b))
        total += one @ other.T
    return total.reshape(units, size, units, size).transpose(1, 2)


def on_both_sides(coupling: Coupling) -> set[str]:
    """Matrices that a set permutes by rows and by columns: no assignment is linear in them, so they are no evidence."""
    names = [member.name for member in coupling.members]
    return {name for name in names if names.count(name) > 1} if coupling.kind == "residual" else set()


@dataclass
class HeadEvidence:
    """How alike the parts of A's and B's heads are in one block.

    Args:
        queries: (heads, heads).
        keys: (groups, groups).
        values: (groups, groups, head_dim, head_dim), by value dimension.
        outputs: (heads, heads, head_dim, head_dim), by value dimension.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor


class WeightEvidence:
    """Similarity as inner products of weights; changes as B is permuted."""

    depends_on_others = True

    def __init__(self, a: Tensors, b: Tensors) -> None:
        self.a, self.b = a, b

    def units(self, coupling: Coupling) -> torch.Tensor:
        members = [member for member in coupling.members if member.name not in on_both_sides(coupling)]
        return _products(self.a, self.b, members, coupling.units)

    def heads(self, heads: Heads) -> HeadEvidence:
        groups, size = heads.groups.units, heads.head_dim
        return HeadEvidence(
            _products(self.a, self.b, heads.queries, heads.count),
            _products(self.a, self.b, heads.keys, groups),
            _products_within(self.a, self.b, heads.value_rows, groups, size),
            _products_within(self.a, self.b, heads.outputs, heads.count, size),
        )

    def experts(self, experts: Experts) -> tuple[torch.Tensor, Callable[[int, int], torch.Tensor]]:
        """Similarity that needs no channels, (experts, experts), and what gives that of the channels of a pair."""
        inside = {member.name for coupling in experts.channels for member in coupling.members}
        rows = [member for member in experts.order.members if member.name not in inside]
        biases = _products(self.a, self.b, rows, experts.order.units)

        def channels(i: int, j: int) -> torch.Tensor:
            one, other = experts.channels[i], experts.channels[j]
            total = torch.zeros(one.units, one.units)
            for mine, theirs in zip(one.members, other.members, strict=True):
                total += units_of(self.a, mine, one.units).flatten(1) @ units_of(self.b, theirs, one.units).flatten(1).T
            return total

        return biases, channels


@dataclass
class Correlations:
    """Similarity as correlation of activations over text, gathered once.

    Args:
        residual: (hidden, hidden), summed over the places between blocks.
        outputs: by block, (heads, heads, head_dim, head_dim), of what o reads.
        channels: by block, (channels, channels), of what down reads.
    """

    residual: torch.Tensor
    outputs: dict[int, torch.Tensor]
    channels: dict[int, torch.Tensor]

    depends_on_others = False

    def units(self, coupling: Coupling) -> torch.Tensor:
        return self.residual if coupling.block is None else self.channels[coupling.block]

    def heads(self, heads: Heads) -> HeadEvidence:
        groups, size = heads.groups.units, heads.head_dim
        return HeadEvidence(
            torch.zeros(heads.count, heads.count), torch.zeros(groups, groups),
            torch.zeros(groups, groups, size, size), self.outputs[heads.block],
        )  # fmt: skip


def correlations(a: Any, b: Any, batches: Text, progress: Callable[[int], Any] = lambda done: None) -> Correlations:
    """What the units of both models do on the same text, for matching by activations.

    Args:
        a, b: live models of one architecture.
        batches: of :func:`espalier.calibrate.pair.text`.
        progress: called with the number of modules that are done, of two for each block.

    Raises:
        EspalierError: for a model with experts.
    """
    found = anatomy(a)
    widths: dict[str, int] = {}
    owner: dict[str, tuple[str, int]] = {}
    for block in found.blocks:
        if block.feed_forward.experts:
            raise EspalierError(
                "experts of two models read different tokens, so their activations cannot be compared; match by weights (--by weights)"
            )
        attention, half = block.attention, block.feed_forward
        for kind, part, width in (("o", attention.o, attention.heads * attention.head_dim), ("down", half.down, half.channels)):
            path = part.weight.rpartition(".")[0]
            widths[path], owner[path] = width, (kind, block.index)
    outputs: dict[int, torch.Tensor] = {}
    channels: dict[int, torch.Tensor] = {}
    for group in moments(a, b, widths, batches, progress=progress):
        for path, sums in group.items():
            kind, index = owner[path]
            if kind == "down":
                channels[index] = sums.correlation()
                continue
            heads, size = found.blocks[index].attention.heads, found.blocks[index].attention.head_dim
            outputs[index] = sums.correlation().reshape(heads, size, heads, size).transpose(1, 2)
    return Correlations(residual_correlation(a, b, found.hidden_size, batches), outputs, channels)


Evidence = WeightEvidence | Correlations
Move = tuple[Coupling, list[int]]


def _identity(order: Sequence[int]) -> bool:
    return list(order) == list(range(len(order)))


def _match_units(evidence: Evidence, coupling: Coupling) -> tuple[list[Move], float, float]:
    similarity = evidence.units(coupling)
    order, best = assign(similarity)
    return [(coupling, order)], best - float(similarity.diagonal().double().sum()), float(similarity.diagonal().double().abs().sum())


def _line_up(queries: torch.Tensor, values: torch.Tensor, outputs: torch.Tensor) -> tuple[list[int], list[int], float]:
    """Query heads and value dimensions of one group of A to one of B, and their similarity.

    The two orders depend on one another and are solved in turn, from several starts, the better result is taken; with one
    query head there is one order only, and the result is exact.

    Args:
        queries: (n, n).
        values: (head_dim, head_dim).
        outputs: (n, n, head_dim, head_dim).
    """
    count = len(queries)
    best: tuple[list[int], list[int], float] | None = None
    starts = [list(range(count))]
    if count > 1:
        dimensions, _ = assign(values)
        starts.append(assign(queries + outputs[:, :, range(len(values)), dimensions].sum(-1))[0])
        starts.append(assign(queries)[0])
    for heads in starts:
        reached = -float("inf")
        while True:
            dimensions, _ = assign(values + outputs[range(count), heads].sum(0))
            by_head = queries + outputs[:, :, range(len(values)), dimensions].sum(-1)
            heads, total = assign(by_head)
            total += float(values[range(len(values)), dimensions].double().sum())
            if total <= reached + _NOISE * abs(reached):
                break
            reached = total
            found = (heads, dimensions, total)
            if best is None or total > best[2]:
                best = found
    assert best is not None
    return best


def _match_heads(evidence: Evidence, heads: Heads) -> tuple[list[Move], float, float]:
    found = evidence.heads(heads)
    groups, per = heads.groups.units, heads.count // heads.groups.units
    similarity = torch.zeros(groups, groups, dtype=torch.float64)
    inside: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    now = 0.0
    for i in range(groups):
        for j in range(groups):
            mine, theirs = slice(i * per, (i + 1) * per), slice(j * per, (j + 1) * per)
            queries, outputs = found.queries[mine, theirs], found.outputs[mine, theirs]
            order, dimensions, total = _line_up(queries, found.values[i, j], outputs)
            inside[i, j] = order, dimensions
            similarity[i, j] = total + float(found.keys[i, j])
            if i == j:
                as_is = found.values[i, i].diagonal().double().sum() + queries.diagonal().double().sum()
                now += float(as_is + outputs[range(per), range(per)].diagonal(dim1=-2, dim2=-1).double().sum() + found.keys[i, i])
    order, best = assign(similarity)
    moves: list[Move] = [(heads.groups, order)]
    moves += [(coupling, inside[i, order[i]][0]) for i, coupling in enumerate(heads.heads)]
    moves += [(coupling, inside[i, order[i]][1]) for i, coupling in enumerate(heads.values)]
    return moves, best - now, abs(now) + float(similarity.diagonal().abs().sum())


def _match_experts(evidence: WeightEvidence, experts: Experts) -> tuple[list[Move], float, float]:
    similarity, channels = evidence.experts(experts)
    similarity = similarity.double()
    now = float(similarity.diagonal().sum())
    inside: dict[tuple[int, int], list[int]] = {}
    for i in range(len(experts.channels)):
        for j in range(len(experts.channels)):
            between = channels(i, j)
            inside[i, j], total = assign(between)
            similarity[i, j] += total
            if i == j:
                now += float(between.diagonal().double().sum())
    order, best = assign(similarity)
    moves: list[Move] = [(experts.order, order)]
    moves += [(coupling, inside[i, order[i]]) for i, coupling in enumerate(experts.channels)]
    return moves, best - now, abs(now) + float(similarity.diagonal().abs().sum())


class Reordered:
    """B's logical tensors, permuted in place, and where every row and column of them came from."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.rows: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.ndim < 2:
                self.rows[name] = torch.arange(tensor.shape[0] if tensor.ndim else 0)
                continue
            *lead, outputs, inputs = tensor.shape
            self.rows[name] = torch.arange(outputs).expand(*lead, outputs).clone()  # (..., out)
            self.columns[name] = torch.arange(inputs).expand(*lead, inputs).clone()  # (..., in)
        self.mixed: set[str] = set()
        """Whose order is none of rows and columns alone: experts moved, or each expert's biases in an order of its own."""

    def apply(self, coupling: Coupling, order: Sequence[int]) -> None:
        """Unit u becomes what unit ``order[u]`` was."""
        if _identity(order):
            return
        permute(self.tensors, coupling, order)
        for member in coupling.members:
            indices = member.indices(coupling.units)
            self._note(member, indices.flatten(), indices[list(order)].flatten())

    def _note(self, member: Member, to: torch.Tensor, source: torch.Tensor) -> None:
        name, ndim = member.name, self.tensors[member.name].ndim
        from_end = ndim - member.axis - (member.expert is not None)
        if from_end == 3 or (ndim == 2 and member.expert is not None):
            self.mixed.add(name)
            return
        index = self.columns[name] if from_end == 1 and ndim > 1 else self.rows[name]
        index = index if member.expert is None else index[member.expert]
        index.index_copy_(-1, to, index.index_select(-1, source))

    @staticmethod
    def _or_none(index: torch.Tensor | None) -> torch.Tensor | None:
        if index is None or bool((index == torch.arange(index.shape[-1])).all()):
            return None
        return index.to(torch.int32)

    def update(self, name: str) -> Update | None:
        """The exact update of one parameter, or ``None`` where it stays as it is."""
        if name in self.mixed:
            return Replace(self.tensors[name].contiguous())
        rows, columns = self._or_none(self.rows[name]), self._or_none(self.columns.get(name))
        if rows is None and columns is None:
            return None
        return Permute(rows, columns, tuple(self.tensors[name].shape))


@dataclass
class Match:
    """What matching found.

    Args:
        reordered: B as it is now.
        objectives: after each step that changed something, the first before any: ``sum_t <A_t, B_t>`` (of correlations
            by activations).
        sweeps: how many there were.
        moved: by kind, how many units are not where they were, of how many.
        similarity: by (kind, block) of channels and groups, each matched pair's, between -1 and 1.
    """

    reordered: Reordered
    objectives: list[float]
    sweeps: int
    moved: dict[str, tuple[int, int]]
    similarity: dict[tuple[str, int], torch.Tensor]


def require_alike(a: Any, b: Any, names: tuple[str, str]) -> None:
    """Refuse two models that are not of one architecture and size.

    Raises:
        EspalierError: naming the first parameter that only one has, or has in another shape.
    """
    shapes = [{target.name: (target.shape, target.roles) for target in parameters(model)} for model in (a, b)]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        one, other = (side.get(name, ("none", ()))[0] for side in shapes)
        if one != other or shapes[0][name][1] != shapes[1][name][1]:
            raise EspalierError(f"{names[0]} and {names[1]} are not of one architecture: {name} is {one} in the first, and {other} in the second")
    for key in ("model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters"):
        mine, theirs = (getattr(model.config.get_text_config(), key, None) for model in (a, b))
        if mine != theirs:
            raise EspalierError(f"{key} is {mine!r} in {names[0]}, and {theirs!r} in {names[1]}; their units mean different things")


def objective(a: Tensors, b: Tensors, without: Container[str] = ()) -> float:
    """``sum_t <A_t, B_t>`` over all parameters but those of :func:`on_both_sides` (the transform of BERT's head)."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a if name not in without)


def match(
    a: Any, b: Any, *, evidence: Correlations | None = None, seed: int = 0, sweeps: int = SWEEPS,
    progress: Callable[[int], Any] = lambda step: None,
) -> Match:  # fmt: skip
    """Permute the live model B in place so that its units line up with those of A.

    Args:
        a, b: transformers models of one architecture.
        evidence: correlations of activations to match by; by default the weights.
        seed: of the order in which sets of units are gone through.
        sweeps: at most so many.
        progress: called with the number of steps taken.

    Raises:
        EspalierError: for a family whose permutations are not known.
    """
    found = symmetries(a)
    first = logical_tensors(a)
    reordered = Reordered(logical_tensors(b))
    source: Evidence = evidence or WeightEvidence(first, reordered.tensors)
    steps: list[Callable[[], tuple[list[Move], float, float]]] = []
    for coupling in (found.residual, *found.channels):
        steps.append(lambda coupling=coupling: _match_units(source, coupling))  # type: ignore[misc]
    for heads in found.attentions:
        steps.append(lambda heads=heads: _match_heads(source, heads))  # type: ignore[misc]
    for experts in found.experts:
        assert isinstance(source, WeightEvidence)  # there are no correlations of a model with experts
        steps.append(lambda experts=experts, source=source: _match_experts(source, experts))  # type: ignore[misc]
    objectives = [objective(first, reordered.tensors, on_both_sides(found.residual)) if evidence is None else 0.0]
    similarity: dict[tuple[str, int], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    done = sweep = 0
    gained = True
    while gained and sweep < sweeps:
        gained = False
        sweep += 1
        for index in torch.randperm(len(steps), generator=generator).tolist():
            moves, gain, scale = steps[index]()
            progress(done := done + 1)
            is_gain = gain > _NOISE * scale
            if evidence is not None:
                similarity.update(_correlations(evidence, found, moves if is_gain else [(c, list(range(c.units))) for c, _ in moves]))
            if not is_gain:
                continue
            for coupling, order in moves:
                reordered.apply(coupling, order)
            objectives.append(objectives[-1] + gain)
            gained = True
        if not source.depends_on_others:
            break
    if evidence is None:
        similarity = _cosines(found, first, reordered.tensors)
    return Match(reordered, objectives, sweep, _moved(found, reordered), similarity)


def _correlations(evidence: Correlations, found: Symmetries, moves: Sequence[Move]) -> dict[tuple[str, int], torch.Tensor]:
    """The correlation of each pair of channels, or of groups (the mean over their heads and value dimensions)."""
    coupling, order = moves[0]
    if coupling.block is None:
        return {}
    key = coupling.kind, coupling.block
    if coupling.kind == "channels":
        return {key: evidence.units(coupling)[range(coupling.units), order]}
    heads = next(h for h in found.attentions if h.groups == coupling)
    outputs, per = evidence.heads(heads).outputs, heads.count // coupling.units
    inside = {(c.kind, c.number): o for c, o in moves[1:]}
    pairs = []
    for group, other in enumerate(order):
        within = inside.get(("heads", group), list(range(per)))
        lined = outputs[range(group * per, (group + 1) * per), [other * per + head for head in within]]  # (per, size, size)
        pairs.append(lined[:, range(heads.head_dim), inside["values", group]].mean())
    return {key: torch.stack(pairs)}


def _moved(found: Symmetries, reordered: Reordered) -> dict[str, tuple[int, int]]:
    """By kind, how many units of B are not where they were, of how many; what is inside groups and experts is not counted."""
    counts: dict[str, tuple[int, int]] = {}
    for coupling in (found.residual, *(heads.groups for heads in found.attentions), *found.channels):
        member = next(m for m in coupling.members if reordered.tensors[m.name].ndim == 2)
        index = (reordered.rows if member.axis == 0 else reordered.columns)[member.name]
        origin = (index[member.indices(coupling.units)[:, 0]] - member.start) // member.stride
        away, units = counts.get(coupling.kind, (0, 0))
        counts[coupling.kind] = away + int((origin != torch.arange(coupling.units)).sum()), units + coupling.units
    return counts


def _cosines(found: Symmetries, a: Tensors, b: Tensors) -> dict[tuple[str, int], torch.Tensor]:
    """The cosine of each matched pair of channels and of groups, over all that belongs to it."""
    result: dict[tuple[str, int], torch.Tensor] = {}
    for coupling in (*(heads.groups for heads in found.attentions), *found.channels):
        dot, one, other = (torch.zeros(coupling.units) for _ in range(3))
        for member in coupling.members:
            x, y = (units_of(side, member, coupling.units).flatten(1) for side in (a, b))
            dot, one, other = dot + (x * y).sum(-1), one + x.square().sum(-1), other + y.square().sum(-1)
        assert coupling.block is not None
        result[coupling.kind, coupling.block] = dot / (one * other).sqrt().clamp_min(1e-30)
    return result


def delta_of(model: Any, reordered: Reordered) -> tuple[dict[str, Update], dict[str, Layout]]:
    """The updates that make P B of B, by parameter, and where each lies."""
    updates: dict[str, Update] = {}
    layouts: dict[str, Layout] = {}
    for target in parameters(model):
        update = reordered.update(target.name)
        if update is not None:
            updates[target.name], layouts[target.name] = update, Layout.of(target)
    return updates, layouts
