"""Which units of a model make a narrower one of the same kind: structural pruning from one model into another.

Units are what :mod:`espalier.anatomy.structure` says goes together: the residual stream (one index set for all blocks), the
key-value heads of a block with their query heads, the dimensions of its heads, and its channels (of every expert). The most
important of each are taken; nothing is computed here but index sets. Background: Sung et al., LST (arXiv:2206.06522).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from espalier.anatomy.parameters import parameters
from espalier.anatomy.site import backbone_path
from espalier.anatomy.structure import Attention, Block, FeedForward, Part, anatomy
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from torch import nn

Sums = tuple[torch.Tensor, torch.Tensor]
"""The importance of a matrix's rows (..., out), and of its columns (..., in)."""


@dataclass(frozen=True)
class Taken:
    """What a parameter of the narrow model is made of.

    Args:
        name: of the wide model's parameter.
        axes: axis of the logical tensor, from the last one (-1) -> indices along it, (n,), or (experts, n); other axes are taken whole.
    """

    name: str
    axes: dict[int, torch.Tensor]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the wide parameter, in logical orientation."""
        for axis, index in self.axes.items():
            index = index.to(tensor.device)
            if index.dim() == 1:
                tensor = tensor.index_select(axis, index)
            else:
                tensor = torch.stack([part.index_select(axis, own) for part, own in zip(tensor, index, strict=True)])
        return tensor


def narrowing(wide: nn.Module, narrow: nn.Module, blocks: Sequence[int], importance: Callable[[str], torch.Tensor]) -> dict[str, Taken]:
    """Where each parameter of ``narrow`` comes from, but for the table of tokens.

    Args:
        wide: a transformers model; its weights are not looked at.
        narrow: a backbone of its kind with smaller widths, heads and channels, whose block n is made of block ``blocks[n]``.
        importance: gives that of every number of a matrix of the blocks, by the wide parameter's name, in its logical shape.

    Raises:
        EspalierError: when a parameter is narrower by something that is not known.
    """
    return _Narrowing(wide, narrow, blocks, importance).taken


_UP: tuple[Literal["gate", "up"], ...] = ("gate", "up")


class _Narrowing:
    def __init__(self, wide: nn.Module, narrow: nn.Module, blocks: Sequence[int], importance: Callable[[str], torch.Tensor]) -> None:
        source, made = anatomy(wide), anatomy(narrow)
        self.sums: dict[str, Sums] = {}
        for name in {part.weight: None for block in source.blocks for part in (*_reads(block), *_writes(block))}:
            whole = importance(name).double()
            self.sums[name] = whole.sum(-1), whole.sum(-2)
        residual = torch.zeros(source.hidden_size, dtype=torch.float64)
        for block in source.blocks:
            for part, side in (*((p, 1) for p in _reads(block)), *((p, 0) for p in _writes(block))):
                residual += self.sums[part.weight][side].reshape(-1, source.hidden_size).sum(0).cpu()
        self.residual = _best(residual, made.hidden_size)
        self.shapes = {target.name: target.shape for target in parameters(narrow)}
        self.wide_shapes = {target.name: target.shape for target in parameters(wide)}
        self.names: dict[str, str] = {}
        self.taken: dict[str, Taken] = {}
        prefix = f"{path}." if (path := backbone_path(wide)) else ""
        for name in self.shapes:
            if name != made.embedding:
                self.names[name] = prefix + name
        for number, block in enumerate(made.blocks):
            other = source.blocks[blocks[number]]
            self.names |= {name: other.path + name.removeprefix(block.path) for name in self.shapes if name.startswith(f"{block.path}.")}
            self._attention(other.attention, block.attention, block)
            self._feed_forward(other.feed_forward, block.feed_forward)
        self._of_the_stream(source.hidden_size, made.hidden_size)

    def _take(self, name: str, axis: int, index: torch.Tensor) -> None:
        taken = self.taken.setdefault(name, Taken(self.names[name], {}))
        taken.axes[axis] = index

    def _rows(self, part: Part | None, index: torch.Tensor) -> None:
        if part is not None:
            self._take(part.weight, -2, index)
            if part.bias is not None:
                self._take(part.bias, -1, index)

    def _of_the_stream(self, hidden: int, width: int) -> None:
        """What is left of every parameter are the axes of the residual stream."""
        for name, source in self.names.items():
            shape, before = self.shapes[name], self.wide_shapes[source]
            axes = self.taken.setdefault(name, Taken(source, {})).axes
            for axis in range(-1, -1 - len(shape), -1):
                if axis not in axes and (before[axis], shape[axis]) == (hidden, width):
                    axes[axis] = self.residual
                if axis not in axes and before[axis] != shape[axis]:
                    raise EspalierError(f"{source} is {list(before)}; which of it makes {list(shape)} is not known, so its model cannot be pruned to a narrower one")

    def _attention(self, wide: Attention, narrow: Attention, block: Block) -> None:
        size, chosen_size = wide.head_dim, narrow.head_dim
        rows, columns = {p: self.sums[getattr(wide, p).weight][0] for p in "qkv"}, self.sums[wide.o.weight][1]
        of_query = torch.stack([rows["q"][wide.rows("q", head)] + columns[wide.columns(head)] for head in range(wide.heads)])
        of_key = torch.stack([rows["k"][wide.rows("k", n)] + rows["v"][wide.rows("v", n)] for n in range(wide.key_value_heads)])
        grouped = of_query.view(wide.key_value_heads, wide.group, size)
        several = -(-chosen_size // size)  # a narrow head may be larger than a wide one: then it is made of several
        groups = _best(of_key.sum(-1) + grouped.sum((-1, -2)), narrow.key_value_heads * several).view(-1, several)
        heads = torch.stack([n * wide.group + _best(grouped[n].sum(-1), narrow.group) for n in groups.flatten().tolist()])
        heads = heads.view(*groups.shape, narrow.group)  # (key-value heads, several, query heads of each)
        score = of_key[groups].sum(0) + of_query[heads].sum((0, 2))  # (several, size): the same dimensions in all heads
        pairs = _best(score.view(several, 2, size // 2).sum(1).flatten(), chosen_size // 2)  # which rotary embeddings turn together
        first = pairs // (size // 2) * size + pairs % (size // 2)
        place = torch.cat((first, first + size // 2))
        which, dimension = place // size, place % size
        index = {part.weight: torch.zeros(self.shapes[part.weight][0], dtype=torch.long) for part in (narrow.q, narrow.k, narrow.v)}
        outputs = torch.zeros(self.shapes[narrow.o.weight][1], dtype=torch.long)
        for number in range(narrow.key_value_heads):
            for letter in ("k", "v"):
                starts = torch.tensor([wide.rows(letter, n).start for n in groups[number].tolist()])
                index[getattr(narrow, letter).weight][narrow.rows(letter, number)] = starts[which] + dimension
            for position in range(narrow.group):
                head, sources = number * narrow.group + position, heads[number, :, position].tolist()
                starts = torch.tensor([wide.rows("q", n).start for n in sources])
                index[narrow.q.weight][narrow.rows("q", head)] = starts[which] + dimension
                outputs[narrow.columns(head)] = torch.tensor([wide.columns(n).start for n in sources])[which] + dimension
        for part in (narrow.q, narrow.k, narrow.v):
            self._rows(part, index[part.weight])
        self._take(narrow.o.weight, -1, outputs)
        here = {self.names[name]: name for name in self.shapes if name.startswith(f"{block.path}.")}
        for norm, part in ((wide.q_norm, narrow.q), (wide.k_norm, narrow.k)):
            for name in norm.names if norm else ():
                self._take(here[name], -1, index[part.weight])
        if narrow.sinks:
            self._take(narrow.sinks, -1, heads[:, 0].flatten())
        for name in block.norms:  # one that all heads share
            if name not in self.taken and self.wide_shapes[self.names[name]] == (size,) and self.shapes[name] == (chosen_size,):
                self._take(name, -1, dimension)

    def _feed_forward(self, wide: FeedForward, narrow: FeedForward) -> None:
        score = self.sums[wide.down.weight][1].clone()  # (channels,), of each expert
        for which in _UP:
            if (part := getattr(wide, which)) is not None:
                score += self.sums[part.weight][0][..., wide.rows(which)]
        flat = score.view(-1, wide.channels)
        channels = torch.stack([_best(own, narrow.channels) for own in flat]).view(*score.shape[:-1], -1)
        for which in _UP:
            if (part := getattr(narrow, which)) is not None:
                made = self.taken.get(part.weight, Taken("", {})).axes.get(-2)  # gate and up may be one matrix
                if made is None:
                    made = torch.zeros(*channels.shape[:-1], self.shapes[part.weight][-2], dtype=torch.long)
                source = wide.rows(which)
                made[..., narrow.rows(which)] = source.start + channels * (source.step or 1)
                self._rows(part, made)
        self._take(narrow.down.weight, -1, channels)
        if wide.shared is not None and narrow.shared is not None:
            self._feed_forward(wide.shared, narrow.shared)


def _halves(half: FeedForward) -> list[FeedForward]:
    return [half, *(_halves(half.shared) if half.shared else [])]


def _reads(block: Block) -> list[Part]:
    """The matrices that read the residual stream, each once; routers are too small to count."""
    attention, halves = block.attention, _halves(block.feed_forward)
    parts = [attention.q, attention.k, attention.v, *(part for half in halves for part in (half.gate, half.up) if part)]
    return list({part.weight: part for part in parts}.values())


def _writes(block: Block) -> list[Part]:
    return [block.attention.o, *(half.down for half in _halves(block.feed_forward))]


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the ``count`` largest, ascending, the first of equals; if there are not so many, some twice."""
    order = scores.argsort(descending=True, stable=True).cpu()
    return order[torch.arange(count) % len(order)].sort().values

