"""A model in memory that merges are put into in the place of files, one after the other: no candidate goes over the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from espalier.anatomy.layout import Place, place
from espalier.anatomy.parameters import parameters
from espalier.checkpoint.stream import one_thread_each
from espalier.errors import EspalierError
from espalier.exchange.merge_plan import Opened
from espalier.exchange.merging import Item, Method, merge_into

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _part(tensor: torch.Tensor, where: Place) -> torch.Tensor:
    """The numbers of a live parameter that are one tensor of a file, in order."""
    found = tensor if where.expert is None else tensor[where.expert]
    rows = found.shape[0] // where.parts if found.dim() else 1
    return found[where.part * rows : (where.part + 1) * rows] if where.parts > 1 else found


class Live:
    """A live model, and where in it the tensors of a merge are.

    Args:
        model: of the merged model's config.
        items: how the first merge is made; later ones have the same tensors.

    Raises:
        EspalierError: when a parameter of the model is in no tensor of the merge, or in one of another shape.
    """

    def __init__(self, model: PreTrainedModel, items: Sequence[Item]) -> None:
        self.model = model
        self._held: dict[str, Item] = {}
        self._made_by: tuple[Method, int] | None = None
        tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
        aliases = {alias: target.name for target in parameters(model) for alias in target.names}
        self._tensors: dict[str, torch.Tensor] = tensors
        self._places: dict[str, Place] = {}
        covered = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
        for known in (tensors, aliases):  # a tied head's name counts only where no other tensor has the numbers
            for item in items:
                where = place(item.name, known)
                if where is None or item.name in self._places:
                    continue
                where = replace(where, name=aliases.get(where.name, where.name))
                tensor = tensors[where.name]
                if known is aliases and covered.get(where.name):
                    continue
                if tuple(_part(tensor, where).shape) != item.shape:
                    raise EspalierError(f"{item.name}: it is {item.shape} in the files, and {tuple(_part(tensor, where).shape)} in {type(model).__name__}")
                self._places[item.name] = where
                if where.name in covered:
                    covered[where.name] += math.prod(item.shape)
        for name, count in covered.items():
            if count != tensors[name].numel():
                raise EspalierError(f"{name} of {type(model).__name__} is not in the merged tensors, or in more than one; merge with espalier merge, and eval")

    def become(self, items: Sequence[Item], method: Method, seed: int) -> None:
        """Let the model be what a merge makes. Tensors that would be what they are now are left.

        Raises:
            EspalierError: as ``merge_into`` does; the model is then undefined until it becomes another.
        """
        same = self._made_by == (method, seed) and method.first_pass is None
        wanted = {item.name for item in items if item.name in self._places and not (same and self._held.get(item.name) == item)}
        self._held, self._made_by = {}, None

        def put(item: Item, numbers: torch.Tensor, start: int) -> None:
            self.numbers(item).view(-1)[start : start + numbers.numel()].copy_(numbers.reshape(-1))

        with torch.no_grad():
            merge_into(put, items, method, seed, lambda done: None, wanted)
        self._held, self._made_by = {item.name: item for item in items}, (method, seed)

    def numbers(self, item: Item) -> torch.Tensor:
        """Where a tensor of the merge is in the model, in the shape of the file."""
        where = self._places[item.name]
        return _part(self._tensors[where.name].detach(), where)

    def require_same(self, items: Sequence[Item], method: Method) -> None:
        """Check that tensors lie in the model as they do in its files.

        Args:
            items: of the model itself, as it was loaded.

        Raises:
            EspalierError: naming the tensor that does not.
        """

        def compare(item: Item, numbers: torch.Tensor, start: int) -> None:
            here = self.numbers(item).reshape(-1)[start : start + numbers.numel()]
            if not torch.equal(here, numbers.reshape(-1).to(here)):
                raise EspalierError(f"{type(self.model).__name__} lays it out in a way that is not known; merge with espalier merge, and eval")

        merge_into(compare, items, method, 0, lambda done: None, self._places)

    def slopes(self, items: Sequence[Item], density: float) -> Mapping[str, torch.Tensor]:
        """The inner products of the gradients that parameters carry with what each model changed.

        Args:
            density: share of the numbers of each change that are kept, the largest; the others are as if zero.

        Returns:
            For each merged tensor (models,), float64. Without a base, changes are from the first model.
        """

        def one(item: Item) -> torch.Tensor:
            parameter = item.parameter(0)
            made = torch.zeros(parameter.models, dtype=torch.float64)
            gradient = self._tensors[self._places[item.name].name].grad
            if gradient is None:
                return made
            numbers = _part(gradient, self._places[item.name]).reshape(parameter.rows, parameter.columns).float().cpu()
            kept = parameter.largest([parameter.count(density)] * parameter.models) if density < 1 else None
            for piece in parameter.pieces():
                changes = piece.updates if parameter.has_base else piece.models - piece.models[:1]
                first = piece.start // parameter.columns
                here = numbers[first : first + changes.shape[1]]
                if kept is not None:
                    changes = changes * kept(changes.abs())
                made += torch.einsum("nrc,rc->nr", changes, here).double().sum(-1)
            return made

        merged = [item for item in items if item.is_merged and item.name in self._places]
        with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
            return dict(zip((item.name for item in merged), pool.map(one, merged), strict=True))


def itself(models: Opened) -> list[Item]:
    """The model that a merge is like, tensor by tensor as it is stored."""
    like = models.like
    return [Item(name, like.dtype(name), like.shape(name), [(like, name)], None, [1.0]) for name in like.names]
