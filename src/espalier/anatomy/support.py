"""Supports: which entries of a model's parameters may change. An algebra of index sets over targets' names and shapes.

A support gives, for one target at a time, a mask that broadcasts to its logical shape: 0-d for all or nothing, (out, 1)
for rows, (in,) for columns, of the full shape only where single entries are meant. So union, intersection and
complement are torch's own operators, keep what is structured small, and never hold the mask of more than one tensor.

Not here: how values at a support are stored and multiplied (``delta/forms/support.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from espalier.anatomy.structure import Anatomy, Attention, Coupling, FeedForward
from espalier.anatomy.target import Target
from espalier.kernels.philox import Stream


@dataclass(frozen=True)
class Support:
    """A set of entries. ``within`` gives a boolean mask that broadcasts to a target's shape."""

    within: Callable[[Target], torch.Tensor]

    def __or__(self, other: Support) -> Support:
        return Support(lambda target: self.within(target) | other.within(target))

    def __and__(self, other: Support) -> Support:
        return Support(lambda target: self.within(target) & other.within(target))

    def __invert__(self) -> Support:
        return Support(lambda target: ~self.within(target))

    def __sub__(self, other: Support) -> Support:
        return self & ~other

    def mask(self, target: Target) -> torch.Tensor:
        """Of the target's shape; a view of what is smaller, where the support is structured."""
        return self.within(target).expand(target.shape)

    def positions(self, target: Target) -> torch.Tensor:
        """The flat positions of a target's entries in the support, (n,) int64, ascending."""
        return self.mask(target).flatten().nonzero().squeeze(-1)

    def count(self, target: Target) -> int:
        """How many entries of a target are in the support."""
        found = self.within(target)
        return int(torch.count_nonzero(found)) * (target.size // max(1, found.numel()))

    def counts(self, targets: Iterable[Target]) -> dict[str, int]:
        """:meth:`count` by the name of each target."""
        return {target.name: self.count(target) for target in targets}


def _either(here: bool) -> torch.Tensor:
    return torch.tensor(here)


EVERYTHING = Support(lambda target: _either(True))
NOTHING = ~EVERYTHING


def layers(blocks: Collection[int]) -> Support:
    """All parameters of some transformer blocks."""
    return Support(lambda target: _either(target.block in blocks))


def tensors(names: Collection[str]) -> Support:
    """Whole parameters, by any of their names."""
    return Support(lambda target: _either(not set(target.names).isdisjoint(names)))


def rows(indices: Mapping[str, torch.Tensor]) -> Support:
    """Rows of matrices (of every expert's, where there are several), or entries of vectors: name to indices (k,)."""
    return Support(lambda target: _along(target, 0, indices[target.name]) if target.name in indices else _either(False))


def columns(indices: Mapping[str, torch.Tensor]) -> Support:
    """Columns of matrices: name to indices (k,)."""
    return Support(lambda target: _along(target, 1, indices[target.name]) if target.name in indices else _either(False))


def units(coupling: Coupling, chosen: Sequence[int]) -> Support:
    """All that belongs to some units of a coupling: attention heads or key-value groups, channels of a feed-forward.

    Rows of what writes them and columns of what reads them, wherever a model fuses these.
    """
    members: dict[str, list[Support]] = {}
    for member in coupling.members:
        index = member.indices(coupling.units)[list(chosen)].flatten()
        members.setdefault(member.name, []).append(
            Support(lambda target, m=member, i=index: _along(target, m.axis, i, m.expert))  # type: ignore[misc]
        )

    def within(target: Target) -> torch.Tensor:
        return union(members.get(target.name, ())).within(target)

    return Support(within)


def entries(positions: Mapping[str, torch.Tensor]) -> Support:
    """Single entries: name to flat positions (n,) in the logical shape."""
    return Support(lambda target: _at(target, positions[target.name]) if target.name in positions else _either(False))


def seeded(seed: int, count: Callable[[Target], int]) -> Support:
    """As many entries of each parameter as ``count`` says, drawn uniformly: a function of seed, name and shape alone."""
    return Support(lambda target: _at(target, Stream(seed, target.name).choice(target.size, count(target))))


def masks(bitmaps: Mapping[str, torch.Tensor]) -> Support:
    """What boolean masks of the parameters' shapes say, by name."""
    return Support(lambda target: bitmaps[target.name] if target.name in bitmaps else _either(False))


def union(supports: Iterable[Support]) -> Support:
    """What is in any of them."""
    found = NOTHING
    for support in supports:
        found |= support
    return found


def _at(target: Target, positions: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(target.size, dtype=torch.bool, device=positions.device)
    found[positions.long()] = True
    return found.view(target.shape)


def _along(target: Target, axis: int, index: torch.Tensor, expert: int | None = None) -> torch.Tensor:
    """Indices along an axis of the logical matrix (0: rows, or a vector's entries; 1: columns), of one expert or of each."""
    inner = target.shape[-2:] if expert is None else target.shape[1:]
    found = torch.zeros(inner[axis], dtype=torch.bool, device=index.device)
    found[index.long()] = True
    if axis == 0 and len(inner) > 1:
        found = found.unsqueeze(-1)
    if expert is None:
        return found
    each = torch.zeros(target.shape[0], *[1] * len(inner), dtype=torch.bool, device=index.device)
    each[expert] = True
    return each & found


# fused modules


@dataclass(frozen=True)
class Section:
    """A part of a fused parameter that other models keep as a parameter of its own.

    Args:
        part: that parameter, (rows, in) or (rows,).
        whole: the name of the fused one.
        rows: which rows of it, (k,).
        expert: of which expert, or ``None``.
    """

    part: Target
    whole: str
    rows: torch.Tensor
    expert: int | None = None

    def cut(self, mask: torch.Tensor) -> torch.Tensor:
        """The part's share of a mask of the whole's shape."""
        return (mask if self.expert is None else mask[self.expert])[self.rows]


def sections(anatomy: Anatomy, target: Target) -> list[Section]:
    """The parts of a parameter that fuses q, k and v, gate and up, or experts; none where it fuses nothing.

    Parts are called ``NAME/q`` or, of an expert, ``NAME/EXPERT/gate``.
    """
    for block in anatomy.blocks if target.block is not None else ():
        if block.index != target.block:
            continue
        for half in (block.attention, block.feed_forward, block.feed_forward.shared):
            if half is not None and target.name in half.names and (parts := _parts(half, target)):
                experts = range(target.shape[0]) if isinstance(half, FeedForward) and half.experts is not None else (None,)
                return [_section(target, which, index, expert) for expert in experts for which, index in parts]
    return []


def _parts(half: Attention | FeedForward, target: Target) -> list[tuple[str, torch.Tensor]]:
    """(name, rows) of the parts of one matrix; "" for all of it, of an expert."""
    if isinstance(half, Attention):
        if half.layout == "separate" or target.name not in half.q.names:
            return []
        order = [("q", half.heads), ("k", half.key_value_heads), ("v", half.key_value_heads)]
        return [
            (which, torch.cat([torch.arange(s.start, s.stop) for head in range(count) for s in [half.rows(which, head)]]))  # type: ignore[arg-type]
            for which, count in order
        ]
    if half.layout != "separate" and target.name in half.up.names:
        return [(which, torch.arange(2 * half.channels)[half.rows(which)]) for which in ("gate", "up")]  # type: ignore[arg-type]
    if half.experts is None or target.name not in (*half.up.names, *half.down.names, *(half.gate.names if half.gate else ())):
        return []
    return [("", torch.arange(target.shape[1]))]


def _section(target: Target, which: str, index: torch.Tensor, expert: int | None) -> Section:
    name = "/".join([target.name, *([] if expert is None else [str(expert)]), *([which] if which else [])])
    shape = (len(index), *target.shape[1 if expert is None else 2 :])
    return Section(replace(target, name=name, names=(name,), shape=shape), target.name, index, expert)


def joined(support: Support, found: Mapping[str, Sequence[Section]]) -> Support:
    """A support of parts as one of the fused parameters.

    Args:
        found: the sections of each fused parameter, by its name; of another parameter the support stays what it is.
    """

    def within(target: Target) -> torch.Tensor:
        if not found.get(target.name):
            return support.within(target)
        mask = torch.zeros(target.shape, dtype=torch.bool)
        for section in found[target.name]:
            (mask if section.expert is None else mask[section.expert])[section.rows] = support.mask(section.part)
        return mask

    return Support(within)


def parted(support: Support, wholes: Mapping[str, Target], found: Mapping[str, Sequence[Section]]) -> Support:
    """A support of fused parameters as one of their parts: the inverse of :func:`joined`."""
    by_part = {section.part.name: section for parts in found.values() for section in parts}

    def within(target: Target) -> torch.Tensor:
        section = by_part.get(target.name)
        return support.within(target) if section is None else section.cut(support.mask(wholes[section.whole]))

    return Support(within)
