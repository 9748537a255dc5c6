"""PLeaS: two matched models into one of a chosen width, arXiv:2407.02447.

Of every set of matched units (a feed-forward's channels, an attention's key-value groups with their query heads) the pairs
that are most alike are merged into one unit; of the others both are kept. So a matrix has blocks: outputs and inputs are
shared, only A's or only B's. Shared outputs are means, an input that only one has counts half towards them, and nothing
leads from what is only A's to what is only B's (section 3). Then every linear layer is fitted in closed form to what the two
layers gave on their own inputs, with that pattern of zeros.

The residual stream is not widened: a norm divides by the mean square over all its units, so two streams side by side would
be normed together, which is what neither model does. It is averaged, and so are norms, embeddings and a tied head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import Anatomy, Coupling, anatomy, couplings
from espalier.anatomy.target import Target
from espalier.attach.load import MALFORMED
from espalier.calibrate.pair import Moments
from espalier.errors import EspalierError

Tensors = Mapping[str, torch.Tensor]
Widen = Literal["all", "channels", "heads"]
_CHANNELS = ("intermediate_size", "n_inner", "ffn_dim")


@dataclass(frozen=True)
class Axis:
    """Where the entries along one axis of a merged tensor come from.

    Args:
        sources: (2, size): the index in A and in the permuted B, or -1 where the model has no part in it.
    """

    sources: torch.Tensor

    @classmethod
    def of(cls, size: int) -> Axis:
        """One that both models share as it is."""
        return cls(torch.arange(size).expand(2, size).clone())

    @property
    def present(self) -> torch.Tensor:
        """(2, size): whether A, or B, has a part in it."""
        return self.sources >= 0

    @property
    def shared(self) -> torch.Tensor:
        """(size,): whether both have."""
        return self.present.all(0)


Axes = dict[str, list[Axis]]
"""Of each parameter, for each axis of its logical tensor."""


def separate(similarity: torch.Tensor, count: int) -> tuple[list[int], list[int]]:
    """The units that are merged, and the ``count`` least alike (of equals the first), of which both are kept; in order."""
    apart = set(similarity.argsort(stable=True)[:count].tolist())
    units = range(len(similarity))
    return [u for u in units if u not in apart], [u for u in units if u in apart]


def _empty(config: Any, kind: type[Any]) -> Any:
    with torch.device("meta"):
        return kind(config)


def _kinds(found: Anatomy, widen: Widen) -> tuple[str, ...]:
    if any(block.feed_forward.experts for block in found.blocks):
        raise EspalierError("a partial merge needs dense feed-forwards; this model has experts, for which matching alone is there (leave --width out)")
    channels = {block.feed_forward.channels for block in found.blocks}
    if len(channels) > 1:
        raise EspalierError(f"the feed-forwards of this model have {sorted(channels)} channels; a partial merge needs the same in every block")
    return ("channels", "groups") if widen == "all" else ("channels",) if widen == "channels" else ("groups",)


def _with(config: Any, found: Anatomy, channels: int, groups: int) -> Any:
    """A config with so many channels and key-value groups, as far as it can say them."""
    made = copy.deepcopy(config)
    attention, half = found.blocks[0].attention, found.blocks[0].feed_forward
    if channels != half.channels:
        setattr(made, next((key for key in _CHANNELS if hasattr(made, key)), _CHANNELS[0]), channels)
    if groups != attention.key_value_heads:
        made.num_attention_heads = groups * attention.group
        if getattr(made, "num_key_value_heads", None) is not None:
            made.num_key_value_heads = groups
        made.head_dim = attention.head_dim
    return made


def _is_possible(model: Any, config: Any, channels: int, groups: int) -> bool:
    """Whether the family makes of that config, read again from its file, a model with those widths and no others."""
    try:
        made = anatomy(_empty(type(config).from_dict(config.to_dict()), type(model)))
    except (*MALFORMED, EspalierError, RuntimeError):
        return False
    old = anatomy(model)
    return made.hidden_size == old.hidden_size and all(
        (new.feed_forward.channels, new.attention.key_value_heads) == (channels, groups)
        and (new.attention.head_dim, new.attention.group) == (before.attention.head_dim, before.attention.group)
        for new, before in zip(made.blocks, old.blocks, strict=True)
    )


Sizes = dict[str, tuple[int, int]]
"""By kind (channels, groups), the units of each block before and after."""


def _sayable(model: Any, found: Anatomy, kinds: Sequence[str]) -> list[int]:
    """The numbers of key-value groups that a merged model may have, those of one model first."""
    groups, channels = found.blocks[0].attention.key_value_heads, found.blocks[0].feed_forward.channels
    # a norm over all heads would norm both models' heads together
    if "groups" not in kinds or any(block.attention.q_norm for block in found.blocks):
        return [groups]
    return [n for n in range(groups, 2 * groups + 1) if _is_possible(model, _with(model.config, found, channels, n), channels, n)]


def widths(model: Any, width: float, widen: Widen = "all") -> Sizes:
    """The units of a merged model that is ``width`` times as wide in every kind that is widened.

    Rounded to the nearest number that the family's config can say, of two the smaller.

    Raises:
        EspalierError: when the width is not from 1 to 2, or the model is of a kind that has no partial merge.
    """
    if not 1 <= width <= 2:
        raise EspalierError(f"width is {width}; it must be from 1 (merge everything) to 2 (keep everything of both)")
    found = anatomy(model)
    kinds = _kinds(found, widen)
    channels, groups = found.blocks[0].feed_forward.channels, found.blocks[0].attention.key_value_heads
    taken = min(_sayable(model, found, kinds), key=lambda n: (abs(n - groups * width), n)) if "groups" in kinds else groups
    return {"channels": (channels, round(channels * width) if "channels" in kinds else channels), "groups": (groups, taken)}


def _costs(model: Any) -> tuple[int, dict[str, int]]:
    """Multiplications for a token in all matrices of a model, and in what one unit more of each kind adds to all blocks."""
    targets = {target.name: target for target in parameters(model)}
    total = sum(t.size for t in targets.values() if t.is_matrix and (t.block is not None or "head" in t.roles))
    units = {"channels": 0, "groups": 0}
    for coupling in couplings(anatomy(model)):
        if coupling.kind in units:
            for member in coupling.members:
                target = targets[member.name]
                units[coupling.kind] += member.width * target.shape[1 - member.axis] if target.is_matrix else 0
    return total, units


def require_budget(flops: float) -> None:
    """Refuse what no merge of two models could take.

    Raises:
        EspalierError: when the budget is not from 1 to 2.
    """
    if not 1 <= flops <= 2:
        raise EspalierError(f"flops is {flops}; it must be from 1 (as many as one model takes) to 2")


def budgeted(model: Any, flops: float, widen: Widen, similarity: Mapping[tuple[str, int], torch.Tensor]) -> Sizes:
    """The units of the merged model that keeps apart what is least alike, within ``flops`` times one model's multiplications.

    Of all numbers of groups that the config can say, each with as many channels as then fit, the one for which the sum of
    ``(1 - similarity) * cost`` over the pairs that are kept apart is largest: the linear objective of the paper's budget
    (section 3.2), with dissimilarity for the gain that it measures. Two kinds of units have few enough choices to try all.

    Args:
        similarity: of the matched pairs of channels and of groups, by (kind, block).

    Raises:
        EspalierError: when the budget is not from 1 to 2, or the model is of a kind that has no partial merge.
    """
    require_budget(flops)
    found = anatomy(model)
    kinds = _kinds(found, widen)
    channels, groups = found.blocks[0].feed_forward.channels, found.blocks[0].attention.key_value_heads
    total, unit = _costs(model)
    blocks_of = len(found.blocks)

    def gain(kind: str, count: int) -> float:
        apart = [1 - s.sort().values[:count] for (of, _), s in similarity.items() if of == kind]
        return float(sum(part.sum() for part in apart)) * unit[kind] / blocks_of

    best = (-1.0, channels, groups)
    for more in (n - groups for n in _sayable(model, found, kinds)):
        left = (flops - 1) * total - more * unit["groups"]
        if left < 0:
            continue
        extra = min(int(left / unit["channels"] + 1e-9), channels) if "channels" in kinds else 0
        best = max(best, (gain("groups", more) + gain("channels", extra), channels + extra, groups + more))
    return {"channels": (channels, best[1]), "groups": (groups, best[2])}


def flops_of(model: Any, sizes: Sizes) -> float:
    """The multiplications of a merged model, as a multiple of those of one model."""
    total, unit = _costs(model)
    return 1 + sum((after - before) * unit[kind] for kind, (before, after) in sizes.items()) / total


def config_of(model: Any, sizes: Sizes) -> Any:
    """The config of the merged model.

    Raises:
        EspalierError: when the family's config cannot say it.
    """
    found = anatomy(model)
    channels, groups = sizes["channels"][1], sizes["groups"][1]
    config = _with(model.config, found, channels, groups)
    if not _is_possible(model, config, channels, groups):
        raise EspalierError(f"the config of this {found.family} model cannot say {channels} channels and {groups} key-value heads")
    return config


def axes(model: Any, merged: Any, similarity: Mapping[tuple[str, int], torch.Tensor]) -> Axes:
    """Where every entry of the merged model comes from.

    Args:
        model: one of the two, for its anatomy.
        merged: the merged model, which may be on the meta device.
        similarity: of the matched pairs of channels and of groups, by (kind, block).
    """
    new_shapes = {target.name: target.shape for target in parameters(merged)}
    found: Axes = {}
    for target in parameters(model):
        sizes = zip(target.shape, new_shapes[target.name], strict=True)
        # what is of another size is filled below: all rows and columns of channels and heads belong to a coupling
        found[target.name] = [Axis.of(new) if new == old else Axis(torch.full((2, new), -1)) for old, new in sizes]
    pairs = [
        [coupling for coupling in couplings(anatomy(side)) if coupling.kind in ("channels", "groups")] for side in (model, merged)
    ]
    for old, new in zip(*pairs, strict=True):
        if old.units != new.units:
            assert old.block is not None
            _place(found, old, new, similarity[old.kind, old.block])
    return found


def _place(found: Axes, old: Coupling, new: Coupling, similarity: torch.Tensor) -> None:
    both, apart = separate(similarity, new.units - old.units)
    none = [-1] * len(apart)
    for model, units in enumerate(([*both, *apart, *none], [*both, *none, *apart])):
        chosen = torch.tensor(units)
        for before, after in zip(old.members, new.members, strict=True):
            indices = before.indices(old.units)[chosen.clamp_min(0)]
            indices[chosen < 0] = -1
            found[after.name][after.axis].sources[model, after.indices(new.units).flatten()] = indices.flatten()


def _weights(rows: Axis, model: int) -> torch.Tensor:
    """What a model's outputs count: half where both have a part in them, else 1, or 0 without it. (out,)"""
    return torch.where(rows.shared, 0.5, 1.0) * rows.present[model]


def _taken(tensor: torch.Tensor, where: Sequence[Axis], model: int) -> torch.Tensor:
    """One model's entries in their places, 0 elsewhere."""
    taken = tensor
    for axis, entry in enumerate(where):
        taken = taken.index_select(axis, entry.sources[model].clamp_min(0))
        shape = [-1 if i == axis else 1 for i in range(taken.ndim)]
        taken = taken * entry.present[model].reshape(shape)
    return taken


def blocks(a: torch.Tensor, b: torch.Tensor, where: Sequence[Axis]) -> torch.Tensor:
    """The partial merge of one logical tensor: shared outputs are means, others are their model's own.

    Args:
        a, b: of shape (out, in), (out,), or with a leading dimension.
        where: an axis each; the first are outputs.
    """
    rows = where[max(a.ndim - 2, 0)]
    counts = [_weights(rows, model).reshape(-1, *[1] * (a.ndim - max(a.ndim - 2, 0) - 1)) for model in (0, 1)]
    return _taken(a, where, 0) * counts[0] + _taken(b, where, 1) * counts[1]


@dataclass(frozen=True)
class Layer:
    """A linear layer that is fitted.

    Args:
        weight, bias: names of its parameters.
        path: of a module that reads the same inputs.
    """

    weight: str
    bias: str | None
    path: str


def layers(model: Any) -> list[Layer]:
    """The linear layers of the blocks, and the head unless it is tied; q, k and v (gate and up) share a path."""
    known = {name for name, _ in model.named_parameters()}
    found = []
    path_of: dict[str, str] = {}
    for target in parameters(model):
        if not _is_fitted(target):
            continue
        path = path_of.setdefault(target.site, target.name.rpartition(".")[0])
        bias = target.name.removesuffix("weight") + "bias"
        found.append(Layer(target.name, bias if bias in known else None, path))
    return found


def _is_fitted(target: Target) -> bool:
    return len(target.names) == 1 and target.route == "linear" and (target.block is not None or target.role == "head")


@dataclass(frozen=True)
class Fit:
    """A layer's squared errors on both models' own inputs, as shares of the squared norm of what they gave.

    Args:
        before: of the partial merge by blocks.
        after: of the least squares.
    """

    before: float
    after: float


def fit(
    weights: tuple[torch.Tensor, torch.Tensor], biases: tuple[torch.Tensor, torch.Tensor] | None, where: tuple[Axis, Axis],
    moments: Moments, ridge: float,
) -> tuple[torch.Tensor, torch.Tensor | None, Fit]:  # fmt: skip
    """The linear layer with the pattern of zeros of a partial merge that is closest to both layers on their own inputs.

    ``min |X W^T - Y|^2`` with ``X = [(Z1 + Z2)/2, Z1, Z2]`` for inputs that are shared, only A's, only B's, and ``Y`` the
    outputs ``Z_k W_k^T + b_k`` in the same way; in closed form, one regression for each kind of output on the inputs that it
    may read. What is solved for is the difference from the partial merge, with a ridge, so that inputs that never came leave
    the partial merge as it was, and the error never grows.

    Args:
        weights: of A and of the permuted B, (out, in).
        biases: the same, (out,), or ``None``.
        where: of rows and of columns of the merged layer.
        moments: of the inputs of A and of the permuted B.
        ridge: times the mean of the diagonal of ``X^T X`` is added to it.

    Returns:
        W (new out, new in), the bias, and the errors.

    Raises:
        EspalierError: when the inputs are too much alike to be solved for.
    """
    rows, columns = where
    n, last = moments.width, 2 * moments.width
    start = blocks(weights[0].double(), weights[1].double(), where)  # (out, in)
    made = columns.sources.shape[1]
    read = torch.zeros(last + 1, made + 1, dtype=torch.float64)  # (z_A, z_B, 1) -> (X, 1)
    wanted = torch.zeros(len(start), last + 1, dtype=torch.float64)  # (z_A, z_B, 1) -> Y
    for model in (0, 1):
        present = columns.present[model].nonzero().flatten()
        read[model * n + columns.sources[model, present], present] = torch.where(columns.shared[present], 0.5, 1.0).double()
        counts = _weights(rows, model).double()
        wanted[:, model * n : (model + 1) * n] = _taken(weights[model].double(), (rows,), model) * counts[:, None]
        if biases is not None:
            wanted[:, last] += _taken(biases[model].double(), (rows,), model) * counts
    read[last, made] = 1.0
    constant = blocks(biases[0].double(), biases[1].double(), (rows,)) if biases is not None else start.new_zeros(len(start))
    solution = torch.cat([start, constant[:, None]], dim=1)
    missing = wanted - solution @ read.T
    total = float(((wanted @ moments.sums) * wanted).sum())
    before = float(((missing @ moments.sums) * missing).sum())
    gram, pull = read.T @ moments.sums @ read, missing @ moments.sums @ read
    for outputs, inputs in _regressions(rows, columns, biases is not None):
        square = gram[inputs][:, inputs]
        square.diagonal().add_(ridge * square.diagonal().mean() + 1e-30)
        try:
            change = torch.cholesky_solve(pull[outputs][:, inputs].T, torch.linalg.cholesky(square)).T
        except torch.linalg.LinAlgError as error:
            raise EspalierError(f"its inputs are too much alike to be solved for with the ridge {ridge}; take a larger one") from error
        solution[outputs[:, None], inputs] += change
    missing = wanted - solution @ read.T
    after = float(((missing @ moments.sums) * missing).sum())
    share = max(total, 1e-300)
    return solution[:, :-1].float(), solution[:, -1].float() if biases else None, Fit(before / share, after / share)


def _regressions(rows: Axis, columns: Axis, has_bias: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(outputs, inputs that they may read, the 1 last): shared outputs read all, others what their model has a part in."""
    one = torch.tensor([columns.sources.shape[1]] * has_bias, dtype=torch.long)
    everything = torch.arange(columns.sources.shape[1])
    yield rows.shared.nonzero().flatten(), torch.cat([everything, one])
    for model in (0, 1):
        outputs = (rows.present[model] & ~rows.shared).nonzero().flatten()
        if len(outputs):
            yield outputs, torch.cat([columns.present[model].nonzero().flatten(), one])
