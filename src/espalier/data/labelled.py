"""The order of training on labelled texts, and their batches: whole texts, shuffled, padded on the right.

An epoch visits every text once, in an order drawn from (seed, epoch). A text longer than the sequence length is cut at its
end, but for the special tokens that the tokenizer puts there. The texts of a step are divided among micro-batches
of similar length; the loss is averaged over the step's texts, so the division changes nothing but memory and speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from espalier.data.batches import Batch, Cursor
from espalier.data.encode import Encoder
from espalier.data.store import TokenStore
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream


class Labelled:
    """The texts of a store of labels, by number: their tokens, and the class of each.

    Args:
        classes: names of the classes, in the order of the model's outputs.
        sequence_length: of the longest text that is taken whole.

    Raises:
        EspalierError: when a label is none of the classes.
    """

    def __init__(self, store: TokenStore, encoder: Encoder, classes: Sequence[str], sequence_length: int, seed: int = 0) -> None:
        if unknown := [name for name in store.names if name not in classes]:
            count = int((store.labels == store.names.index(unknown[0])).sum())
            raise EspalierError(
                f"the data have the label {unknown[0]!r} ({count} of {store.documents} texts), which the model does not know; "
                f"it knows: {', '.join(classes)}"
            )
        if sequence_length <= len(encoder.closing):
            raise EspalierError(f"sequence_length is {sequence_length}; it must be more than the {len(encoder.closing)} tokens that end every text")
        self.store, self.sequence_length, self.seed = store, sequence_length, seed
        self.closing = np.asarray(encoder.closing, np.int64)
        self.classes = np.asarray([classes.index(name) for name in store.names], np.int64)[store.labels]
        self.lengths = np.minimum(np.diff(store.offsets), sequence_length)
        self.unit = max(1, sequence_length // 16)  # kernels are compiled, and freed memory is reused, by size: few must occur
        self._epoch = -1

    @property
    def truncated(self) -> int:
        """How many texts are cut."""
        return int((np.diff(self.store.offsets) > self.sequence_length).sum())

    def tokens(self, number: int) -> np.ndarray:
        """The token ids of one text, cut to the sequence length."""
        begin, end = int(self.store.offsets[number]), int(self.store.offsets[number + 1])
        if end - begin <= self.sequence_length:
            return self.store.read(begin, end)
        return np.concatenate((self.store.read(begin, begin + self.sequence_length - len(self.closing)), self.closing))

    def _padded(self, length: int) -> int:
        return min(-(-length // self.unit) * self.unit, self.sequence_length)

    def batch(self, numbers: Sequence[int], pad_token: int) -> Batch:
        """Texts as one batch, padded to a multiple of a sixteenth of the sequence length; its ``targets`` (texts,) are their classes."""
        rows = [self.tokens(number) for number in numbers]
        lengths = tuple(len(row) for row in rows)
        longest = self._padded(max(lengths))
        ids = np.stack([np.pad(row, (0, longest - len(row)), constant_values=pad_token) for row in rows])
        mask = np.arange(longest) < np.asarray(lengths)[:, None]
        positions = torch.arange(longest).expand(len(rows), -1)
        targets = torch.from_numpy(self.classes[list(numbers)])
        task = self.store.tasks[self.store.task_of[numbers[0]]] if self.store.tasks else ""
        attended = torch.from_numpy(mask.astype(np.int64))
        return Batch(torch.from_numpy(ids), positions, targets, None, lengths, sum(lengths), attended, task)

    def divide(self, numbers: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
        """Texts in runs of one task and of similar length, longest first, of at most ``micro_tokens`` tokens with their padding."""
        for own in self.store.by_task(numbers, int).values():
            yield from self._runs(own, micro_tokens)

    def _runs(self, numbers: Iterable[int], micro_tokens: int) -> Iterator[list[int]]:
        run: list[int] = []
        for number in sorted(numbers, key=lambda n: -int(self.lengths[n])):
            if run and (len(run) + 1) * self._padded(int(self.lengths[run[0]])) > micro_tokens:
                yield run
                run = []
            run.append(number)
        if run:
            yield run

    # the order of training, as data.batches.Order has it

    def steps_of_epoch(self, batch_tokens: int) -> float:
        """Steps that an epoch takes."""
        return self.store.documents / (batch_tokens // self.sequence_length)

    def batches(self, cursor: Cursor, batch_tokens: int, micro_tokens: int, padded: bool, pad_token: int) -> list[Batch]:
        """The micro-batches of the next step, of ``batch_tokens / sequence_length`` texts; moves the cursor."""
        numbers: list[int] = []
        for _ in range(batch_tokens // self.sequence_length):
            if cursor.position >= self.store.documents:
                cursor.epoch, cursor.position = cursor.epoch + 1, 0
            if cursor.epoch != self._epoch:
                self._permutation = Stream(self.seed, f"order of epoch {cursor.epoch}").permutation(self.store.documents)
                self._epoch = cursor.epoch
            numbers.append(int(self._permutation[cursor.position]))
            cursor.position += 1
        return [self.batch(run, pad_token) for run in self.divide(numbers, micro_tokens)]
