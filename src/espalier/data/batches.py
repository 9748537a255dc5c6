"""The order of training and the batches: windows of documents, shuffled, packed without padding.

A *window* is a run of at most ``sequence_length`` predictions inside one document. An epoch visits every
window once, in an order drawn from (seed, epoch); documents longer than a window are cut at a place that
moves from epoch to epoch. A step takes windows from that order until ``batch_size * sequence_length``
predictions are reached, so its whole state is (epoch, position): nothing is carried over that would have
to be saved. Windows of a step are divided among micro-batches by size; the loss is averaged over the
step's target tokens, so the division changes nothing but memory and speed.

A micro-batch is one row of windows end to end; positions restart in each and attention stays inside it
(``memory/packed_attention.py``). For a family that cannot do that it is padded to rectangles instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from espalier.data.store import TokenStore
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream

_FEW = 0.75
_ROUND = 64
IGNORED = -100
"""The target of positions that are not predicted."""


@dataclass(frozen=True)
class Window:
    """Predictions [start, stop) of the store's tokens: token i + 1 is predicted from those up to i."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class Batch:
    """One micro-batch.

    ``input_ids`` and ``position_ids`` are (1, n) when packed, (windows, longest) when padded, then with
    ``attention_mask``. All windows are of one ``task``, where tasks are told apart. ``targets`` are flat: of all positions, or of the positions ``rows`` where few are
    predicted. ``lengths`` are the windows' lengths in order, ``tokens`` how many tokens they have, filler and
    padding not counted.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor | None
    lengths: tuple[int, ...]
    tokens: int
    attention_mask: torch.Tensor | None = None
    task: str = ""

    @property
    def target_count(self) -> int:
        return int((self.targets != IGNORED).sum())

    @property
    def windows(self) -> torch.Tensor:
        """(targets,): the number of the window, or of the text of a label, that each target is of."""
        rows, longest = self.input_ids.shape
        if self.attention_mask is None:
            of_position = torch.repeat_interleave(torch.tensor(self.lengths, device=self.targets.device))
        elif self.rows is None and len(self.targets) == rows:
            return torch.arange(rows, device=self.targets.device)
        else:
            of_position = torch.arange(rows * longest, device=self.targets.device) // longest
        return of_position if self.rows is None else of_position[self.rows]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved)


class Order:
    """The windows of every epoch of a store, in the order in which they are trained on."""

    def __init__(self, store: TokenStore, sequence_length: int, seed: int) -> None:
        self.store = store
        self.sequence_length = sequence_length
        self.seed = seed
        self._predictions = np.maximum(np.diff(store.offsets) - 1, 0)
        if not self._predictions.any():
            raise EspalierError(f"no document of {store.path} has two tokens, so there is nothing to predict")
        self._epoch = -1

    @property
    def predictions(self) -> int:
        """Predictions in one epoch."""
        return int(self._predictions.sum())

    def steps_of_epoch(self, batch_tokens: int) -> float:
        """Steps that an epoch takes."""
        return self.predictions / batch_tokens

    def batches(self, cursor: Cursor, batch_tokens: int, micro_tokens: int, padded: bool, pad_token: int) -> list[Batch]:
        """The micro-batches of the next step; moves the cursor."""
        windows = next_step(self, cursor, batch_tokens)
        groups = self.store.by_task(windows, lambda window: self.store.document_at(window.start))
        return [
            dataclasses.replace(make_batch(self.store, part, micro_tokens, padded, pad_token), task=task)
            for task, own in groups.items()
            for part in divide(list(own), micro_tokens, padded)
        ]

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        length = self.sequence_length
        stream = Stream(self.seed, f"order of epoch {epoch}")
        long = self._predictions > length
        first = np.full(len(self._predictions), length, np.int64)
        first[long] = stream.integers32(int(long.sum())).numpy() % length + 1
        counts = np.where(long, 1 + -(-(self._predictions - first) // length), (self._predictions > 0).astype(np.int64))
        self._first = first
        self._ends = np.cumsum(counts)
        self._permutation = stream.permutation(int(self._ends[-1])).numpy()
        self._epoch = epoch

    def count(self, epoch: int) -> int:
        """Windows of an epoch."""
        self._enter(epoch)
        return int(self._ends[-1])

    def window(self, epoch: int, position: int) -> Window:
        """The window at a position of an epoch's order."""
        self._enter(epoch)
        which = int(self._permutation[position])
        document = int(np.searchsorted(self._ends, which, side="right"))
        index = which - (int(self._ends[document - 1]) if document else 0)
        begin, total = int(self.store.offsets[document]), int(self._predictions[document])
        first, length = int(self._first[document]), self.sequence_length
        start = 0 if index == 0 else first + (index - 1) * length
        stop = min(first + index * length, total)
        return Window(begin + start, begin + stop)


@dataclass
class Cursor:
    """Where training stands in the order; all that a checkpoint must hold of the data."""

    epoch: int = 0
    position: int = 0


def next_step(order: Order, cursor: Cursor, tokens: int) -> list[Window]:
    """The windows of the next step, ``tokens`` predictions at most (at least one window); moves the cursor."""
    taken: list[Window] = []
    total = 0
    while True:
        if cursor.position >= order.count(cursor.epoch):
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
        window = order.window(cursor.epoch, cursor.position)
        if taken and total + len(window) > tokens:
            return taken
        taken.append(window)
        total += len(window)
        cursor.position += 1
        if total >= tokens:
            return taken


def divide(windows: Sequence[Window], tokens: int, padded: bool = False) -> list[list[Window]]:
    """Divide windows among micro-batches of at most ``tokens`` tokens (padding counted), longest first.

    Packed: best fit, so that few micro-batches are needed. Padded: runs of similar length.
    """
    bins: list[list[Window]] = []
    room: list[int] = []
    for window in sorted(windows, key=len, reverse=True):
        size = len(window)
        if padded:
            if bins and (len(bins[-1]) + 1) * len(bins[-1][0]) <= tokens:
                bins[-1].append(window)
            else:
                bins.append([window])
            continue
        fits = [i for i, left in enumerate(room) if left >= size]
        if fits:
            best = min(fits, key=room.__getitem__)
            bins[best].append(window)
            room[best] -= size
        else:
            bins.append([window])
            room.append(tokens - size)
    return bins


def _targets(store: TokenStore, window: Window, tokens: np.ndarray) -> np.ndarray:
    targets = tokens[1:]
    flags = store.read_targets(window.start + 1, window.stop + 1)
    return targets if flags is None else np.where(flags, targets, IGNORED)


def make_batch(
    store: TokenStore, windows: Sequence[Window], micro_tokens: int, padded: bool = False, pad_token: int = 0
) -> Batch:
    """A micro-batch of windows, packed end to end or padded on the right."""
    rows = [store.read(w.start, w.stop + 1) for w in windows]
    targets = [_targets(store, w, r) for w, r in zip(windows, rows, strict=True)]
    return assemble([r[:-1] for r in rows], targets, micro_tokens, padded, pad_token)


def assemble(
    inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray], micro_tokens: int, padded: bool, pad_token: int = 0
) -> Batch:
    """A batch from rows of inputs and of targets.

    A packed row is filled up with a window that is no target to a multiple of a sixteenth of
    ``micro_tokens``, which it does not exceed: kernels are compiled and freed memory is reused by exact
    size, so few sizes must occur.
    """
    tokens = sum(len(row) for row in inputs)
    if not padded and (filler := min(-tokens % max(1, micro_tokens // 16), max(0, micro_tokens - tokens))):
        inputs = [*inputs, np.full(filler, pad_token, np.int64)]
        targets = [*targets, np.full(filler, IGNORED, np.int64)]
    lengths = tuple(len(row) for row in inputs)
    longest = max(lengths) if padded else 0

    def laid_out(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
        if not padded:
            return np.concatenate(rows)[None]
        return np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows])

    ids, goals = laid_out(inputs, pad_token), laid_out(targets, IGNORED).reshape(-1)
    positions = laid_out([np.arange(n) for n in lengths], 0)
    kept = np.flatnonzero(goals != IGNORED)
    rows = None
    if len(kept) <= _FEW * len(goals):
        filler = -len(kept) % _ROUND
        goals = np.pad(goals[kept], (0, filler), constant_values=IGNORED)
        rows = torch.from_numpy(np.pad(kept, (0, filler)))
    mask = torch.from_numpy(laid_out([np.ones(n, np.int64) for n in lengths], 0)) if padded else None
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(goals), rows, lengths, tokens, mask
    )  # fmt: skip


def scoring_windows(store: TokenStore, sequence_length: int, limit: int | None = None) -> Iterator[tuple[Window, int]]:
    """Windows that score every prediction of every document exactly once: (window, predictions to skip).

    After a document's first window each further one starts half a window earlier, so that every
    prediction but those near the document's start sees at least half a window of context; its first
    part only gives context and is skipped. ``limit`` ends after so many documents.
    """
    stride = max(1, sequence_length // 2)
    for document in range(min(store.documents, limit or store.documents)):
        begin, end = int(store.offsets[document]), int(store.offsets[document + 1]) - 1
        scored = begin
        while scored < end:
            start = begin if scored == begin else scored - (sequence_length - stride)
            stop = min(start + sequence_length, end)
            yield Window(start, stop), scored - start
            scored = stop
