"""Candidates: entries that may come into a support, found by the dense gradients of a step's backward passes.

A method watches a part for the step that begins (:func:`watch`): to ``propose``, for each matrix the k entries with the largest
gradients of the step, or to ``gather`` the gradients of those. In the backward pass one dense gradient is there at a
time; what is kept are k positions and numbers. :func:`settle` ends that. Candidates are the same on every process, and
what is gathered are gradients of the step: of all its micro-batches and processes. Those that are proposed are the largest of
the sums over each product's k largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from espalier.delta.selection import largest
from espalier.kernels.sharded import from_each, mean_over

Look = Callable[[Any, int, torch.Tensor, int | None], None]


def none(count: int) -> dict[str, torch.Tensor]:
    """The tensor of a part that has the candidates of its matrices, one after another: positions in each, -1 for none."""
    return {"candidates": torch.full((count,), -1)}


def watch(part: Any, k: int, look: Look | None) -> None:
    """Let the backward passes of the step that begins :func:`propose`, or :func:`gather`, k of each matrix; or not."""
    part.look = look
    part.found = torch.zeros(len(part.candidates), device=part.candidates.device) if look is not None else None
    if look is propose:
        part.candidates.fill_(-1)


@torch.no_grad()
def propose(part: Any, k: int, gradient: torch.Tensor, expert: int | None = None) -> None:
    """Take the largest of one product's gradients in."""
    for e, one in _matrices(gradient, expert):
        best = largest(one.abs().nan_to_num_(), k)  # what is no number, the loop refuses after the backward pass
        _merge(part.candidates.view(-1, k)[e], part.found.view(-1, k)[e], best, one[best].float())


@torch.no_grad()
def gather(part: Any, k: int, gradient: torch.Tensor, expert: int | None = None) -> None:
    """Add up what the candidates get of one product's gradient."""
    for e, one in _matrices(gradient, expert):
        own = part.candidates.view(-1, k)[e]
        part.found.view(-1, k)[e] += torch.where(own >= 0, one[own.clamp(min=0)].float(), 0.0)


def settle(part: Any, k: int) -> torch.Tensor | None:
    """The gradients are there: make proposals the same on every process, or give what was gathered, the mean over processes."""
    look, found = part.look, part.found
    part.look = part.found = None
    if look is gather:
        return mean_over(part.values, found)
    if look is propose:
        first, *others = zip(*(from_each(part.values, t) for t in (part.candidates, found)), strict=True)
        own, sums = (t.clone().view(-1, k) for t in first)
        for other in others:
            positions, values = (t.view_as(own) for t in other)
            for e in range(len(own)):
                _merge(own[e], sums[e], positions[e], values[e])
        part.candidates.copy_(own.view(-1))
    return None


def _matrices(gradient: torch.Tensor, expert: int | None) -> list[tuple[int, torch.Tensor]]:
    """(number, flat gradient) of each matrix."""
    flat = gradient.reshape(-1, gradient.shape[-2] * gradient.shape[-1])
    return [(number if expert is None else expert, one) for number, one in enumerate(flat)]


def _merge(own: torch.Tensor, sums: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
    """Take further candidates in, in place: what both have is added up, and of all the largest stay, ascending."""
    union, where = torch.cat((own, positions)).unique(return_inverse=True)
    total = torch.zeros(len(union), device=values.device).index_add(0, where, torch.cat((sums, values)))
    best = largest(torch.where(union >= 0, total.abs().nan_to_num_(), -1.0), min(len(own), len(union)))
    own.fill_(-1)[: len(best)] = union[best]
    sums.zero_()[: len(best)] = total[best]
