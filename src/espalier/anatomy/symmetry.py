"""Every permutation that a transformer's function does not notice: what weight matching may choose from.

Beside the couplings of :mod:`espalier.anatomy.structure` (channels, key-value groups, query heads of a group) these are
the residual stream, whose units are tied over all blocks; the dimensions of a head's values, which only its columns of o
read; and the order of experts, with the rows of their router. The dimensions of q and k keep their places, because rotary
embeddings turn them in pairs. Everything is derived from the roles and shapes of the anatomy; what is not known is refused
by name. Background: Ainsworth et al., Git Re-Basin (arXiv:2209.04836).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import (
    Anatomy,
    Attention,
    Block,
    Coupling,
    FeedForward,
    Member,
    Part,
    anatomy,
    couplings,
)
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Heads:
    """The permutations of one block's attention, and the entries that say which heads are alike.

    Args:
        groups: key-value heads, each with its query heads.
        heads: the query heads of each group; empty where a group has one.
        values: the value dimensions of each group, which its query heads share.
        queries: rows of q (and what else has a value per query head), a unit per query head.
        keys: rows of k, a unit per key-value head.
        value_rows: rows of v, a unit per key-value head, of ``head_dim`` indices.
        outputs: columns of o, a unit per query head, of ``head_dim`` indices.
        count, head_dim: number of query heads, and dimensions of each.
    """

    groups: Coupling
    heads: tuple[Coupling, ...]
    values: tuple[Coupling, ...]
    queries: tuple[Member, ...]
    keys: tuple[Member, ...]
    value_rows: tuple[Member, ...]
    outputs: tuple[Member, ...]
    count: int
    head_dim: int

    @property
    def block(self) -> int:
        assert self.groups.block is not None
        return self.groups.block


@dataclass(frozen=True)
class Experts:
    """The permutations of one block's experts: their order, and the channels of each."""

    order: Coupling
    channels: tuple[Coupling, ...]


@dataclass(frozen=True)
class Symmetries:
    """All permutations of a model that leave its function as it is.

    Args:
        residual: the units of the residual stream.
        attentions: one for each block.
        channels: of each dense feed-forward, shared ones among them.
        experts: one for each block that has experts.
    """

    residual: Coupling
    attentions: tuple[Heads, ...]
    channels: tuple[Coupling, ...]
    experts: tuple[Experts, ...]

    def __iter__(self) -> Iterator[Coupling]:
        yield self.residual
        for attention in self.attentions:
            yield from (attention.groups, *attention.heads, *attention.values)
        yield from self.channels
        for experts in self.experts:
            yield from (experts.order, *experts.channels)


def _rows(part: Part | None, start: int, stride: int, width: int) -> list[Member]:
    return [Member(name, 0, start, stride, width) for name in (part.names if part else ())]


def _attention(attention: Attention, groups: Coupling, heads: tuple[Coupling, ...]) -> Heads:
    size, group = attention.head_dim, attention.group
    first, stride = attention.place("v")
    values = []
    for number in range(attention.key_value_heads):
        members = _rows(attention.v, attention.rows("v", number).start, 1, 1)
        members += [
            Member(attention.o.weight, 1, attention.columns(head).start, 1, 1) for head in range(number * group, (number + 1) * group)
        ]
        values.append(Coupling("values", groups.block, size, tuple(members), number))
    sinks = [Member(attention.sinks, 0, 0, 1, 1)] if attention.sinks else []
    return Heads(
        groups, heads, tuple(values),
        queries=(*_rows(attention.q, *attention.place("q"), size), *_rows(attention.q_norm, 0, size, size), *sinks),
        keys=(*_rows(attention.k, *attention.place("k"), size), *_rows(attention.k_norm, 0, size, size)),
        value_rows=tuple(_rows(attention.v, first, stride, size)),
        outputs=(Member(attention.o.weight, 1, 0, size, size),),
        count=attention.heads, head_dim=size,
    )  # fmt: skip


def _experts(block: Block, inside: tuple[Coupling, ...]) -> Experts:
    half = block.feed_forward
    assert half.experts is not None and half.router is not None
    parts = [part for part in (half.up, half.gate, half.down, half.router) if part]
    names = dict.fromkeys(name for part in parts for name in part.names)  # gate and up may be one parameter
    order = Coupling("experts", block.index, half.experts, tuple(Member(name, 0, 0, 1, 1) for name in names))
    return Experts(order, inside)


class _Residual:
    """Collects what has an entry, a row or a column for each unit of the residual stream."""

    def __init__(self, model: Any, found: Anatomy) -> None:
        self.model, self.found = model, found
        self.targets = parameters(model)
        self.shapes = {target.name: target.shape for target in self.targets}
        self.members: dict[tuple[str, int], None] = {}

    def refuse(self, name: str, why: str) -> EspalierError:
        return EspalierError(f"{name} of this {self.found.family} model {why}; the units of its residual stream cannot be told")

    def add(self, name: str, axis: int) -> None:
        """``axis`` counts from the last one, which is -1."""
        axis += len(self.shapes[name])
        if self.shapes[name][axis] != self.found.hidden_size:
            raise self.refuse(name, f"is {list(self.shapes[name])}, which does not fit a hidden size of {self.found.hidden_size}")
        self.members[name, axis] = None

    def writes(self, part: Part) -> None:
        self.add(part.weight, -2)
        if part.bias:
            self.add(part.bias, -1)

    def reads(self, *parts: Part | None) -> None:
        for part in parts:
            if part:
                self.add(part.weight, -1)

    def feed_forward(self, half: FeedForward) -> None:
        self.reads(half.up, half.gate, half.router, half.shared_gate)
        self.writes(half.down)
        if half.shared:
            self.feed_forward(half.shared)

    def norm(self, name: str) -> None:
        kind = type(self.model.get_submodule(name.rpartition(".")[0])).__name__
        if not re.search("rms|layer", kind, re.IGNORECASE):
            raise self.refuse(name, f"belongs to a {kind}, which may not treat all units alike")
        self.add(name, -1)

    def block(self, block: Block) -> None:
        attention = block.attention
        self.reads(attention.q, attention.k, attention.v)
        self.writes(attention.o)
        self.feed_forward(block.feed_forward)
        homes = {part.weight.rsplit(".", 2)[0] for part in (attention.q, block.feed_forward.up)} - {block.path}
        for name in block.norms:
            if name not in attention.names and not any(name.startswith(home + ".") for home in homes):
                self.norm(name)

    def outside(self) -> None:
        projects = any(target.role == "projection" for target in self.targets)
        for target in self.targets:
            for role in target.roles if target.block is None else ():
                width = target.shape[-1]
                if role.startswith("norm"):
                    self.norm(target.name)
                elif role in ("head.bias", "head.classifier.bias"):
                    continue
                elif role in ("embedding", "head", "embedding.position", "embedding.type", "head.classifier"):
                    if width == self.found.hidden_size or not projects:
                        self.add(target.name, -1)
                elif role == "projection":
                    self.add(target.name, -2 if "project_in" in target.name else -1)
                elif role == "head.transform":  # what it gives meets the embedding, which may be the head
                    self.add(target.name, -1)
                    self.add(target.name, -2)
                elif role == "head.transform.bias":
                    self.add(target.name, -1)
                else:
                    raise self.refuse(target.name, "has a part in it that is not known")

    def read(self) -> Coupling:
        for block in self.found.blocks:
            self.block(block)
        self.outside()
        members = tuple(Member(name, axis, 0, 1, 1) for name, axis in self.members)
        return Coupling("residual", None, self.found.hidden_size, members)


def _refuse_buffers(model: Any, found: Anatomy) -> None:
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in known and math.prod(tensor.shape) > 1:
            raise EspalierError(
                f"{name} of this {found.family} model is stored and no parameter; its part in the model is not known, so nothing can be permuted"
            )
    groups = getattr(model.config.get_text_config(), "n_group", None)
    if groups not in (None, 0, 1):
        raise EspalierError(f"this {found.family} model routes by {groups} groups of experts (n_group); their order cannot be changed freely")


def symmetries(model: nn.Module) -> Symmetries:
    """Every permutation of units that leaves the function of a transformers model as it is; weights may be on the meta device.

    Any of them can be applied by :func:`espalier.anatomy.structure.permute`, alone or one after the other.

    Raises:
        EspalierError: naming the family and the parameter, where something is not known well enough to be moved.
    """
    found = anatomy(model)
    _refuse_buffers(model, found)
    every = couplings(found)

    def of(kind: str, block: int) -> tuple[Coupling, ...]:
        return tuple(c for c in every if c.kind == kind and c.block == block)

    attentions: list[Heads] = []
    channels: list[Coupling] = []
    experts: list[Experts] = []
    for block in found.blocks:
        (groups,) = of("groups", block.index)
        attentions.append(_attention(block.attention, groups, of("heads", block.index)))
        inside = of("channels", block.index)
        if block.feed_forward.experts:
            experts.append(_experts(block, inside[: block.feed_forward.experts]))
            inside = inside[block.feed_forward.experts :]
        channels += inside
    return Symmetries(_Residual(model, found).read(), tuple(attentions), tuple(channels), tuple(experts))
