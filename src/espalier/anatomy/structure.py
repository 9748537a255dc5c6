"""The anatomy of a transformers model, whatever its family: blocks, attention heads, channels, and what moves together.

Everything is read off the roles and logical shapes of :func:`espalier.anatomy.parameters.parameters` and the
config; nothing is traced and no weight is looked at, so models on the meta device have an anatomy too. How
the families that fuse q, k and v lay out the rows, which no shape tells, is in a table of ``parameters.py``. Not covered:
encoder-decoders, attention with latent or gated projections, state-space blocks, blocks that share parameters;
they are refused by name.

:func:`couplings` lists what can be permuted without changing what a model computes. The same index sets say
what has to go together when a channel, a head or a key-value group is pruned. Background: Ainsworth et al., Git
Re-Basin (arXiv:2209.04836); Ma et al., LLM-Pruner (arXiv:2305.11627).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from espalier.anatomy.parameters import BLOCK, FUSED, parameters
from espalier.anatomy.target import Target
from espalier.errors import EspalierError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Part:
    """The parameters of one layer, by canonical name; ``bias`` is ``None`` where it has none."""

    weight: str
    bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    Args:
        q, k, v: where the projections are; all three name the same parameters where a model fuses them.
        o: the output projection, (hidden, heads * head_dim).
        layout: ``separate``; or, fused, ``blocks`` (all of q, all of k, all of v) or ``heads`` (q, k and v of
            head 0, then of head 1, ...).
        heads: number of query heads.
        key_value_heads: number of key-value heads; each serves ``group`` query heads in a row.
        head_dim: rows of q, k and v per head.
        q_norm, k_norm: norms with a value for every row of q and of k (OLMo 2); ``None`` where there is none, or
            one that all heads share (Qwen3).
        sinks: one value per query head that takes part in the softmax (gpt-oss), or ``None``.
    """

    q: Part
    k: Part
    v: Part
    o: Part
    layout: Literal["separate", "blocks", "heads"]
    heads: int
    key_value_heads: int
    head_dim: int
    q_norm: Part | None = None
    k_norm: Part | None = None
    sinks: str | None = None

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.key_value_heads

    def place(self, which: Literal["q", "k", "v"]) -> tuple[int, int]:
        """(first row of head 0, rows from one head to the next) in the matrix that holds q, k or v."""
        if self.layout == "heads":
            return "qkv".index(which) * self.head_dim, 3 * self.head_dim
        before = {"q": 0, "k": self.heads, "v": self.heads + self.key_value_heads}[which]
        return (before * self.head_dim if self.layout == "blocks" else 0), self.head_dim

    def rows(self, which: Literal["q", "k", "v"], head: int) -> slice:
        """The rows of one head in the logical (out, in) matrix that holds q, k or v, and in its bias.

        Args:
            which: the projection.
            head: index of the query head for q, of the key-value head for k and v.

        Raises:
            IndexError: when there is no such head.
        """
        first, stride = self.place(which)
        start = first + range(self.heads if which == "q" else self.key_value_heads)[head] * stride
        return slice(start, start + self.head_dim)

    def columns(self, head: int) -> slice:
        """The columns of the logical matrix o that read the output of one query head.

        Raises:
            IndexError: when there is no such head.
        """
        start = range(self.heads)[head] * self.head_dim
        return slice(start, start + self.head_dim)

    @property
    def names(self) -> set[str]:
        """Every parameter of the attention, but norms that all heads share."""
        parts = (self.q, self.k, self.v, self.o, self.q_norm, self.k_norm)
        own = {name for part in parts if part for name in part.names}
        return own | {self.sinks} if self.sinks else own


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of one block, dense or of experts.

    Args:
        up: (channels, hidden); for experts (experts, ..., hidden).
        gate: the same, or ``None``; names the same parameters as ``up`` where a model fuses the two.
        down: (hidden, channels); for experts (experts, hidden, channels).
        layout: ``separate``; or, fused, ``concatenated`` (gate, then up) or ``interleaved`` (row by row).
        channels: the intermediate size, of each expert where there are experts.
        experts: number of experts, or ``None`` for a dense feed-forward.
        experts_per_token: how many of them a token goes to, or ``None``.
        router: (experts, hidden), or ``None``.
        shared: the dense feed-forward that every token goes to beside its experts, or ``None``.
        shared_gate: (1, hidden), what scales ``shared``, or ``None``.
    """

    up: Part
    gate: Part | None
    down: Part
    layout: Literal["separate", "concatenated", "interleaved"]
    channels: int
    experts: int | None = None
    experts_per_token: int | None = None
    router: Part | None = None
    shared: FeedForward | None = None
    shared_gate: Part | None = None

    def rows(self, which: Literal["gate", "up"]) -> slice:
        """The rows of gate or up, channel by channel, in the logical matrix (of an expert) that holds it."""
        second = which == "up"
        if self.layout == "interleaved":
            return slice(int(second), 2 * self.channels, 2)
        start = self.channels if second and self.layout == "concatenated" else 0
        return slice(start, start + self.channels, 1)

    @property
    def names(self) -> set[str]:
        """Every parameter of the feed-forward."""
        parts = (self.up, self.gate, self.down, self.router, self.shared_gate)
        own = {name for part in parts if part for name in part.names}
        return own | self.shared.names if self.shared else own


@dataclass(frozen=True)
class Block:
    """One block of the stack.

    Args:
        index: its number, from 0.
        path: of its module in the model.
        attention, feed_forward: its two halves.
        norms: names of all its norms' parameters.
        others: names of parameters whose part in the block is not known; couplings are refused then.
    """

    index: int
    path: str
    attention: Attention
    feed_forward: FeedForward
    norms: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every parameter of the block."""
        return {*self.attention.names, *self.feed_forward.names, *self.norms, *self.others}


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of. All names are canonical, as in ``model.named_parameters()``.

    Args:
        family: the config's ``model_type``.
        hidden_size: width of the residual stream.
        vocabulary: rows of the token embedding.
        blocks: in order.
        embedding: the token embedding, (vocabulary, hidden or a narrower width).
        positions: the embedding of positions, or ``None``.
        final_norm: the norm after the last block, or ``None``.
        head: the map to logits; its weight is the embedding's name where they are tied. ``None`` without a head.
        tied: the names of each parameter that has several.
        logit_softcap: c where logits become c * tanh(logits / c), or ``None``.
        logit_scale: what logits are multiplied by before that.
    """

    family: str
    hidden_size: int
    vocabulary: int
    blocks: tuple[Block, ...]
    embedding: str
    positions: str | None
    final_norm: Part | None
    head: Part | None
    tied: tuple[tuple[str, ...], ...]
    logit_softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class Member:
    """One parameter's share in a coupling: unit u has the indices ``start + u * stride + (0 .. width - 1)``.

    Args:
        name: of the parameter.
        axis: of the logical tensor, or of its slice for ``expert``: for a matrix 0 for rows (and biases), 1 for columns.
        start, stride, width: see above.
        expert: index of the expert whose slice is meant, or ``None``.
    """

    name: str
    axis: int
    start: int
    stride: int
    width: int
    expert: int | None = None

    def indices(self, units: int) -> torch.Tensor:
        """The indices along ``axis`` that belong to each of the first ``units`` units, (units, width)."""
        import torch

        return self.start + torch.arange(units)[:, None] * self.stride + torch.arange(self.width)


@dataclass(frozen=True)
class Coupling:
    """Units that are alike (channels, heads, groups) with all that belongs to each; their order is free.

    Args:
        kind: ``channels`` of a feed-forward (of one expert, or of the shared one), ``groups`` (key-value heads,
            each with its query heads), ``heads`` (the query heads of one key-value group), or of those of
            :mod:`espalier.anatomy.symmetry`: ``residual``, ``values`` (of one key-value group) or ``experts``.
        block: index of the block; ``None`` for the residual stream, which is in all.
        units: how many.
        members: what belongs to them.
        number: the expert for ``channels`` of one, the group for ``heads`` and ``values``, otherwise ``None``.
    """

    kind: Literal["channels", "groups", "heads", "residual", "values", "experts"]
    block: int | None
    units: int
    members: tuple[Member, ...]
    number: int | None = None


def _of(
    part: Part | None, axis: Literal[0, 1], start: int, stride: int, width: int, expert: int | None = None
) -> list[Member]:
    """The members that a layer contributes: rows of its weight with those of its bias, or columns of its weight."""
    names = () if part is None else part.names if axis == 0 else (part.weight,)
    return [Member(name, axis, start, stride, width, expert) for name in names]


def _channels(block: int, half: FeedForward) -> Iterator[Coupling]:
    for expert in range(half.experts) if half.experts else (None,):
        up, gate = half.rows("up"), half.rows("gate")
        members = [
            *_of(half.up, 0, up.start, up.step, 1, expert),
            *_of(half.gate, 0, gate.start, gate.step, 1, expert),
            *_of(half.down, 1, 0, 1, 1, expert),
        ]
        yield Coupling("channels", block, half.channels, tuple(members), expert)
    if half.shared is not None:
        yield from _channels(block, half.shared)


def _query_units(attention: Attention, head: int, width: int) -> list[Member]:
    """What belongs to each run of ``width`` query heads, from head ``head`` on: in q, o, the norm of q and the sinks."""
    size = attention.head_dim
    rows, stride = attention.rows("q", head), attention.place("q")[1]
    members = [
        # with layout "heads" the rows of neighbouring heads do not touch, but then width is 1
        *_of(attention.q, 0, rows.start, width * stride, width * size),
        *_of(attention.q_norm, 0, head * size, width * size, width * size),
        *_of(attention.o, 1, attention.columns(head).start, width * size, width * size),
    ]
    return members + ([Member(attention.sinks, 0, head, width, width)] if attention.sinks else [])


def _heads(block: int, attention: Attention) -> Iterator[Coupling]:
    size = attention.head_dim
    members = _query_units(attention, 0, attention.group)
    for which, part in (("k", attention.k), ("v", attention.v)):
        members += _of(part, 0, *attention.place(which), size)  # type: ignore[arg-type]
    members += _of(attention.k_norm, 0, 0, size, size)
    yield Coupling("groups", block, attention.key_value_heads, tuple(members))
    if attention.group > 1:
        for number in range(attention.key_value_heads):
            inner = _query_units(attention, number * attention.group, 1)
            yield Coupling("heads", block, attention.group, tuple(inner), number)


def couplings(anatomy: Anatomy) -> list[Coupling]:
    """What moves, is pruned or is permuted together: feed-forward channels, key-value groups, query heads in a group.

    Any permutation of a coupling's units leaves the model's function as it was; see :func:`permute`.

    Raises:
        EspalierError: when a block holds parameters whose part is not known, so that moving the rest may break it.
    """
    found: list[Coupling] = []
    for block in anatomy.blocks:
        if block.others:
            raise EspalierError(
                f"{block.path} of this {anatomy.family} model holds parameters whose part in it is not known "
                f"({', '.join(block.others)}); its channels and heads cannot be moved or pruned safely"
            )
        found += [*_heads(block.index, block.attention), *_channels(block.index, block.feed_forward)]
    return found


def logical_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name -> the parameter in logical orientation, (..., out, in); views that share the model's memory."""
    stored = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        target.name: stored[target.name].transpose(-1, -2) if target.transposed else stored[target.name]
        for target in parameters(model)
    }


def permute(tensors: nn.Module | Mapping[str, torch.Tensor], coupling: Coupling, permutation: Sequence[int]) -> None:
    """Reorder a coupling's units, in place: unit u becomes what unit ``permutation[u]`` was.

    Args:
        tensors: a model, or its logical tensors by canonical name.
        coupling: from :func:`couplings` of that model.
        permutation: of ``range(coupling.units)``.

    Raises:
        EspalierError: when ``permutation`` is not one.
    """
    from torch import nn

    order = [int(unit) for unit in permutation]
    if sorted(order) != list(range(coupling.units)):
        raise EspalierError(
            f"the permutation of {coupling.units} {coupling.kind} must hold each of 0 .. {coupling.units - 1} once"
        )
    if isinstance(tensors, nn.Module):
        tensors = logical_tensors(tensors)
    for member in coupling.members:
        tensor = tensors[member.name]
        part = tensor if member.expert is None else tensor[member.expert]
        indices = member.indices(coupling.units).to(tensor.device)
        part.index_copy_(member.axis, indices.flatten(), part.index_select(member.axis, indices[order].flatten()))


class _Reader:
    """Finds the parts of one model; every refusal names its class."""

    def __init__(self, model: Any) -> None:
        self.model = model
        if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
            self.refuse("is not a transformers model: it has no config or no get_input_embeddings")
        self.config = model.config.get_text_config()
        self.targets = parameters(model)
        self.known = {name: target for target in self.targets for name in target.names}

    def refuse(self, why: str) -> NoReturn:
        raise EspalierError(f"{type(self.model).__name__} {why}")

    def layer(self, name: str) -> Part:
        """The part whose weight has that name, among the parameter's names."""
        bias = name.removesuffix("weight") + "bias" if name.endswith(".weight") else name + "_bias"
        return Part(self.known[name].name, self.known[bias].name if bias in self.known else None)

    def one(self, inside: Sequence[Target], path: str, role: str) -> Part | None:
        """The one part of that role, or ``None`` without any."""
        named = [target.name for target in inside if target.role == role]
        if len(named) > 1:
            self.refuse(f"has {len(named)} parameters with the role {role} in {path} ({named[0]}, {named[1]}, ...)")
        return self.layer(named[0]) if named else None

    def need(self, inside: Sequence[Target], path: str, role: str) -> Part:
        found = self.one(inside, path, role)
        return found or self.refuse(f"has no parameter with the role {role} in {path}; this kind of block is not known")

    def shape(self, part: Part) -> tuple[int, ...]:
        return self.known[part.weight].shape

    def attention(self, inside: Sequence[Target], path: str) -> Attention:
        heads = self.config.num_attention_heads
        o = self.need(inside, path, "attention.o")
        size = self.shape(o)[-1] // heads
        fused = self.one(inside, path, "attention.qkv")
        layout: Literal["separate", "blocks", "heads"] = "separate"
        if fused is not None:
            if self.config.model_type not in FUSED:
                self.refuse(f"keeps q, k and v in one matrix ({fused.weight}) whose layout is not known")
            q, k, v, layout = fused, fused, fused, FUSED[self.config.model_type]
            key_value_heads = (self.shape(fused)[0] // size - heads) // 2
            rows = [self.shape(fused)[0]]
            expected = [(heads + 2 * key_value_heads) * size]
        else:
            q, k, v = (self.need(inside, path, f"attention.{which}") for which in "qkv")
            key_value_heads = self.shape(k)[0] // size
            rows = [self.shape(part)[0] for part in (q, k, v)]
            expected = [heads * size, key_value_heads * size, key_value_heads * size]
        if rows != expected or key_value_heads < 1 or heads % key_value_heads or self.shape(o)[-1] != heads * size:
            self.refuse(
                f"has an attention of an unknown kind in {path}: {heads} heads, {self.shape(o)[-1]} columns in o, "
                f"and {rows} rows in {'qkv' if fused else 'q, k and v'}"
            )
        norms: dict[str, Part] = {}
        for target in inside:
            matched = re.search(r"\.([qk])_(?:layer)?norm\.weight$", target.name)
            count = {"q": heads, "k": key_value_heads}.get(matched.group(1) if matched else "", 0)
            if matched and target.shape == (count * size,) and count > 1:
                norms[matched.group(1)] = self.layer(target.name)
        sinks = self.one(inside, path, "sinks")
        per_row = {"q_norm": norms.get("q"), "k_norm": norms.get("k")}
        return Attention(
            q, k, v, o, layout, heads, key_value_heads, size, **per_row, sinks=sinks.weight if sinks else None
        )

    def feed_forward(self, inside: Sequence[Target], path: str) -> FeedForward:
        if any(target.role.startswith("experts.") for target in inside):
            return self.experts(inside, path)
        return self.half(inside, path, "mlp")

    def half(self, inside: Sequence[Target], path: str, kind: str) -> FeedForward:
        """A feed-forward, or all experts of one, without its router."""
        down = self.need(inside, path, f"{kind}.down")
        channels = self.shape(down)[-1]
        fused = self.one(inside, path, f"{kind}.gate_up")
        layout: Any = self.known[fused.weight].gate_up if fused else "separate"
        up = fused or self.need(inside, path, f"{kind}.up")
        gate = fused or self.one(inside, path, f"{kind}.gate")
        rows = [self.shape(part)[-2] for part in (up, gate) if part]
        if any(count != channels * (2 if fused else 1) for count in rows):
            self.refuse(
                f"has a feed-forward of an unknown kind in {path}: {channels} columns in down, {rows} rows in up and gate"
            )
        return FeedForward(up, gate, down, layout, channels)

    def experts(self, inside: Sequence[Target], path: str) -> FeedForward:
        half = self.half(inside, path, "experts")
        count = self.shape(half.down)[0]
        router = self.need(inside, path, "router")
        if self.shape(router)[0] != count:
            self.refuse(f"routes {path} with {router.weight} of shape {self.shape(router)}; it needs a row for each of {count} experts")
        per_token = getattr(self.config, "num_experts_per_tok", None)
        if per_token is None:
            self.refuse("does not say in its config how many experts a token goes to (num_experts_per_tok)")
        has_shared = any(target.role.startswith("mlp.") for target in inside)
        shared = self.half(inside, path, "mlp") if has_shared else None
        gate = self.one(inside, path, "router.shared")
        return replace(half, experts=count, experts_per_token=per_token, router=router, shared=shared, shared_gate=gate)

    def block(self, index: int, path: str, inside: Sequence[Target]) -> Block:
        attention, feed_forward = self.attention(inside, path), self.feed_forward(inside, path)
        claimed = attention.names | feed_forward.names
        homes = {part.weight.rsplit(".", 2)[0] for part in (attention.q, feed_forward.up)} - {path}
        norms, others = [], []
        for target in inside:
            is_norm = target.role.startswith("norm")
            if is_norm:
                norms.append(target.name)
            # a norm over something else than the residual stream or one head belongs to units that we would miss
            at_home = any(target.name.startswith(home + ".") for home in homes)
            plain = is_norm and target.shape == (attention.head_dim if at_home else self.config.hidden_size,)
            if target.name not in claimed and not plain:
                others.append(target.name)
        return Block(index, path, attention, feed_forward, tuple(norms), tuple(others))

    def blocks(self) -> tuple[Block, ...]:
        inside: dict[tuple[str, int], list[Target]] = {}
        for target in self.targets:
            if found := BLOCK.search(target.name):
                if len(target.names) > 1:
                    self.refuse(f"shares {target.name} with {target.names[1]}; blocks that share parameters are not covered")
                path = target.name[: found.end(1)]
                inside.setdefault((path.rpartition(".")[0], int(found.group(1))), []).append(target)
        stacks = sorted({stack for stack, _ in inside})
        if len(stacks) != 1:
            self.refuse(f"has {len(stacks)} stacks of blocks ({', '.join(stacks) or 'none found'}); one is needed")
        return tuple(self.block(index, f"{stack}.{index}", inside[stack, index]) for stack, index in sorted(inside))

    def outside(self, role: str) -> list[str]:
        """The names (of all that tied parameters have) with that role."""
        return [name for target in self.targets for name, is_ in zip(target.names, target.roles, strict=True) if is_ == role]

    def read(self) -> Anatomy:
        blocks = self.blocks()
        embedding, head, positions = self.outside("embedding"), self.outside("head"), self.outside("embedding.position")
        if not embedding:
            self.refuse("has no token embedding among its parameters")
        owner = blocks[0].path.rpartition(".")[0].rpartition(".")[0]
        final = [
            target.name
            for target in self.targets
            if target.role == "norm" and target.block is None and target.name.rpartition(".")[0].rpartition(".")[0] == owner
        ]
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere
        divide = getattr(self.config, "logits_scaling", None) or 1.0  # Granite
        return Anatomy(
            family=self.config.model_type,
            hidden_size=self.config.hidden_size,
            vocabulary=self.known[embedding[0]].shape[0],
            blocks=blocks,
            embedding=self.known[embedding[0]].name,
            positions=self.known[positions[0]].name if positions else None,
            final_norm=self.layer(final[-1]) if final else None,
            head=self.layer(head[0]) if head else None,
            tied=tuple(target.names for target in self.targets if len(target.names) > 1),
            logit_softcap=getattr(self.config, "final_logit_softcapping", None),
            logit_scale=scale / divide,
        )


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers model; of its structure only, so weights may be on the meta device.

    Raises:
        EspalierError: naming the model's class, when it is no transformers model, has no or several stacks of
            blocks, or an attention or a feed-forward of a kind that is not known.
    """
    return _Reader(model).read()
