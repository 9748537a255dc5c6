"""Two live models on the same text: the second moments, within and between them, of what chosen layers read.

For methods that compare or fit layers of two networks that share no coordinates (matching by activations, PLeaS). Both
models are in memory; the moments are gathered for as many layers at a time as a bound on their bytes allows, with a pass
over the text for each such group. Not cached on disk: they belong to a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from espalier.data.batches import IGNORED, Window
from espalier.data.store import TokenStore

Text = list[tuple[torch.Tensor, torch.Tensor]]
"""Token ids (rows, length) and the targets of each, with ``IGNORED`` where nothing is to be predicted."""


def text(store: TokenStore, windows: Sequence[Window], rows: int = 8) -> Text:
    """The sequences of a store, those of one length together, at most ``rows`` at a time; nothing is padded."""
    found: Text = []
    group: list[tuple[np.ndarray, np.ndarray]] = []

    def flush() -> None:
        if group:
            found.append((torch.from_numpy(np.stack([i for i, _ in group])), torch.from_numpy(np.stack([t for _, t in group]))))
            group.clear()

    for window in sorted(windows, key=len, reverse=True):
        row = store.read(window.start, window.stop + 1).astype(np.int64)
        flags = store.read_targets(window.start + 1, window.stop + 1)
        targets = row[1:] if flags is None else np.where(flags, row[1:], IGNORED)
        if group and (len(group) == rows or len(group[0][0]) != len(window)):
            flush()
        group.append((row[:-1], targets))
    flush()
    return found


@dataclass
class Moments:
    """Sums over rows (z_A, z_B, 1) of what a layer of width ``width`` reads in A and in B.

    Args:
        width: n.
        sums: sum of outer products, (2 n + 1, 2 n + 1), float64; the last entry is the number of rows.
    """

    width: int
    sums: torch.Tensor

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(width, torch.zeros(2 * width + 1, 2 * width + 1, dtype=torch.float64))

    @staticmethod
    def nbytes(width: int) -> int:
        return 8 * (2 * width + 1) ** 2

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add rows (..., n) of both models, which are of the same tokens."""
        a, b = (side.reshape(-1, self.width).double() for side in (a, b))
        rows = torch.cat([a, b, a.new_ones(len(a), 1)], dim=1)
        self.sums.addmm_(rows.T, rows)

    def correlation(self) -> torch.Tensor:
        """Pearson correlation of every input of A with every input of B, (n, n); 0 where one of them is constant."""
        n, count = self.width, self.sums[-1, -1]
        mean = self.sums[-1, :-1] / count
        covariance = self.sums[:n, n:-1] / count - torch.outer(mean[:n], mean[n:])
        square = self.sums.diagonal()[:-1] / count
        variance = square - mean.square()
        deviation = torch.where(variance > 1e-12 * square, variance, torch.inf).sqrt()
        return (covariance / torch.outer(deviation[:n], deviation[n:])).float()


def _inputs(model: Any, paths: Sequence[str], kept: dict[str, torch.Tensor]) -> list[Callable[[], None]]:
    def keep(path: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            kept[path] = args[0]

        return hook

    return [model.get_submodule(path).register_forward_pre_hook(keep(path)).remove for path in paths]


@torch.no_grad()
def moments(
    a: Any, b: Any, widths: Mapping[str, int], batches: Text, largest: int = 2 << 30, progress: Callable[[int], Any] = lambda done: None
) -> Iterator[dict[str, Moments]]:
    """The moments of what modules read, in groups whose bytes stay under ``largest`` (but for a single module).

    Args:
        widths: path of each linear module -> number of its inputs.
        progress: called with the number of modules that are done.
    """
    done = 0
    waiting = list(widths)
    while waiting:
        group = [waiting.pop(0)]
        while waiting and sum(Moments.nbytes(widths[path]) for path in (*group, waiting[0])) <= largest:
            group.append(waiting.pop(0))
        found = {path: Moments.empty(widths[path]) for path in group}
        kept: list[dict[str, torch.Tensor]] = [{}, {}]
        remove = [handle for model, rows in zip((a, b), kept, strict=True) for handle in _inputs(model, group, rows)]
        try:
            for ids, _ in batches:
                a(input_ids=ids, use_cache=False)
                b(input_ids=ids, use_cache=False)
                for path, sums in found.items():
                    sums.add(kept[0][path], kept[1][path])
        finally:
            for handle in remove:
                handle()
        progress(done := done + len(group))
        yield found


@torch.no_grad()
def residual_correlation(a: Any, b: Any, width: int, batches: Text) -> torch.Tensor:
    """Correlation of the units of the residual stream, (hidden, hidden), summed over all places between blocks."""
    places: list[Moments] = []
    for ids, _ in batches:
        states = [model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states for model in (a, b)]
        places = places or [Moments.empty(width) for _ in states[0]]
        for sums, one, other in zip(places, *states, strict=True):
            sums.add(one, other)
    return torch.stack([sums.correlation() for sums in places]).sum(0)
