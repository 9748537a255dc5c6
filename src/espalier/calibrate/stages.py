"""The passes of a calibration: forwards block by block, backwards where gradients are asked for; each is kept on disk.

Every stage leaves its statistics in a file of the work folder when it is done, after the hidden states that the
next one reads; a run that was killed goes on at the first stage whose file is missing, to the same bits.

Backwards, the input of every block and the gradient of its output are read from disk: what a backward pass
over the whole model would do, with one block in memory. A sample of the Fisher information is one sequence (a
window of a document), its loss the summed cross-entropy of its target tokens.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from espalier.anatomy.target import Target
from espalier.calibrate.activations import Activations
from espalier.calibrate.store import Request
from espalier.calibrate.walk import Walker
from espalier.calibrate.watch import Gradients, Recorder, Tensors, of_kind
from espalier.checkpoint.atomic import atomic_file
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.data.batches import IGNORED, Window
from espalier.data.store import TokenStore
from espalier.errors import EspalierError, NotFiniteError
from espalier.memory.meter import release_free_memory


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """The folder of an unfinished run, ours alone while we live.

    Raises:
        EspalierError: when another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        raise EspalierError(f"another process makes this calibration (in {folder}); wait for it") from error
    finally:
        os.close(descriptor)


class Run:
    """One calibration under way.

    Args:
        walker: the model.
        store, windows: the sequences, in the order in which they are gone through.
        request: what is wanted.
        targets: the parameters that are watched.
        folder: where stages are kept.
        batch_size: sequences whose rows wait for one addition.
        progress: called with (sequences passed through stages, stage).
    """

    def __init__(
        self, walker: Walker, store: TokenStore, windows: Sequence[Window], request: Request, targets: Sequence[Target],
        folder: Path, batch_size: int, progress: Callable[[int, str], None] = lambda done, stage: None,
    ) -> None:  # fmt: skip
        self.walker, self.store, self.windows, self.request = walker, store, windows, request
        self.folder, self.batch_size, self.progress = folder, batch_size, progress
        self.names = {target.name for target in targets}
        self.backwards = bool(of_kind(request.want, "gradient"))
        self.last = len(walker.blocks)
        self._done = 0

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name -> pass, in order."""
        found: dict[str, Callable[[], None]] = {"embedding": self._embedding}
        for index in range(self.last):
            found[f"forward-{index:05d}"] = lambda index=index: self._forward(index)  # type: ignore[misc]
        found["head"] = self._head
        if self.backwards:
            for index in reversed(range(self.last)):
                found[f"backward-{index:05d}"] = lambda index=index: self._backward(index)  # type: ignore[misc]
            found["outside"] = self._outside
        return found

    def run(self) -> str | None:
        """Do the stages that are not done yet; returns the first of them, where others were."""
        stages = self.stages()
        missing = [name for name in stages if not self.file(name).exists()]
        for position, (name, work) in enumerate(stages.items()):
            self._done, self._stage = position * len(self.windows), name
            if name in missing:
                work()
        return missing[0] if 0 < len(missing) < len(stages) else None

    def file(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"

    def results(self) -> Iterator[tuple[SafetensorsFile, dict[str, Any]]]:
        """The file of each stage, with its coverage and losses."""
        for name in self.stages():
            file = SafetensorsFile(self.file(name))
            yield file, json.loads(file.metadata["facts"])

    # -- what all stages share

    def _chosen(self, targets: Sequence[Target]) -> list[Target]:
        return [target for target in targets if target.name in self.names]

    def _outer(self) -> list[Target]:
        return [target for target in self.walker.targets if target.block is None]

    def states(self, what: str, index: int) -> Activations:
        """``hidden``: what block ``index`` gets (or what comes after the last); ``gradient``: that of the loss to it."""
        lengths = [len(window) for window in self.windows]
        return Activations(self.folder / f"{what}-{index:05d}.bin", lengths, self.walker.width, self.walker.dtype)

    def _recorder(self, targets: Sequence[Target]) -> Recorder:
        return Recorder(self.walker, self._chosen(targets), self.request.want, self.request.rank)

    def _gradients(self, targets: Sequence[Target]) -> Gradients:
        return Gradients(self.walker, self._chosen(targets), self.request.want, self.request.rank)

    def _tokens(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (n,) and what is predicted from each (n,) of a sequence."""
        window = self.windows[index]
        ids = self.store.read(window.start, window.stop + 1)
        flags = self.store.read_targets(window.start + 1, window.stop + 1)
        goals = ids[1:] if flags is None else np.where(flags, ids[1:], IGNORED)
        return torch.from_numpy(ids[:-1]).to(self.walker.device), torch.from_numpy(goals.copy()).to(self.walker.device)

    def _finite(self, tensor: torch.Tensor, what: str, where: str, index: int) -> torch.Tensor:
        """The tensor, if all of it is finite."""
        if not torch.isfinite(tensor).all():
            window = self.windows[index]
            raise NotFiniteError(
                f"{what} {where} are not finite on tokens {window.start:,} to {window.stop:,} of the data (sequence {index}, computed in "
                f"{str(self.walker.dtype).removeprefix('torch.')}); look at that text, at the block's weights, or try --dtype fp32"
            )
        return tensor.detach()

    def _save(self, tensors: Tensors, **facts: Any) -> None:
        with atomic_file(self.file(self._stage)) as temporary:
            write_safetensors(temporary, tensors, {"facts": json.dumps(facts)})

    def _each(self, recorder: Recorder | None = None) -> Iterator[int]:
        """The sequences' numbers; after each batch, what a recorder holds is added up."""
        for index in range(len(self.windows)):
            yield index
            if (index + 1) % self.batch_size == 0:
                if recorder is not None:
                    recorder.add_up()
                release_free_memory()  # sequences of many lengths leave holes
            self.progress(self._done + index + 1, self._stage)

    def _loss(self, logits: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, goals, ignore_index=IGNORED, reduction="sum")

    # -- the stages

    @torch.no_grad()
    def _embedding(self) -> None:
        self.walker.load(self.walker.embedding)
        with self._recorder(self._outer()) as recorder, self.states("hidden", 0).write() as append:
            for index in self._each(recorder):
                ids = self._tokens(index)[0]
                recorder.is_on = False
                self.walker.calls(len(ids))  # runs what is before the blocks, on zeros
                recorder.is_on = True
                append(self._finite(self.walker.embed(ids), "the hidden states", "before the first block", index))
        self.walker.drop(self.walker.embedding)
        tensors, coverage = recorder.results()
        self._save(tensors, coverage=coverage)

    @torch.no_grad()
    def _forward(self, block: int) -> None:
        walker, where = self.walker, f"after block {block} ({self.walker.path(block)})"
        walker.load(walker.inside[block])
        before, after = self.states("hidden", block), self.states("hidden", block + 1)
        with self._recorder(walker.inside[block]) as recorder, before.read() as rows, after.write() as append:
            for index in self._each(recorder):
                append(self._finite(walker.block(block, rows(index).to(walker.device)), "the hidden states", where, index))
        walker.drop(walker.inside[block])
        tensors, coverage = recorder.results()
        self._save(tensors, coverage=coverage)
        if not self.backwards:
            before.path.unlink()

    def _head(self) -> None:
        """What comes after the blocks; with gradients, the losses and their gradients there."""
        walker, where = self.walker, "after the last block"
        walker.load(walker.head)
        own = self._gradients([t for t in (*walker.small, *walker.head) if t not in walker.embedding] if self.backwards else [])
        gradient = self.states("gradient", self.last).write() if self.backwards else nullcontext(lambda rows: None)
        loss, predictions = 0.0, 0
        with self._recorder(self._outer()) as recorder, self.states("hidden", self.last).read() as rows, gradient as append:
            for index in self._each(recorder):
                hidden, goals = rows(index).to(walker.device), self._tokens(index)[1]
                predictions += int((goals != IGNORED).sum())
                recorder.is_on = False
                with torch.set_grad_enabled(self.backwards):
                    logits = walker.logits(hidden.requires_grad_(self.backwards), recorder.switch_on)
                self._finite(logits, "the logits", where, index)
                if self.backwards:
                    summed = self._loss(logits, goals)
                    summed.backward()
                    loss += float(summed.detach())
                    own.take()
                    append(self._finite(hidden.grad, "the gradients", where, index))  # type: ignore[arg-type]
        walker.drop(walker.head)
        tensors, coverage = recorder.results()
        self._save({**tensors, **own.results(own.seen)}, coverage=coverage, loss=loss, predictions=predictions)

    def _backward(self, block: int) -> None:
        walker, where = self.walker, f"before block {block} ({self.walker.path(block)})"
        walker.load(walker.inside[block])
        own = self._gradients(walker.inside[block])
        states, after, before = self.states("hidden", block), self.states("gradient", block + 1), self.states("gradient", block)
        with states.read() as rows, after.read() as gradients, before.write() as append:
            for index in self._each():
                hidden = rows(index).to(walker.device).requires_grad_()
                walker.block(block, hidden).backward(gradients(index).to(walker.device))
                own.take()
                append(self._finite(hidden.grad, "the gradients", where, index))  # type: ignore[arg-type]
        tensors = own.results()
        walker.drop(walker.inside[block])
        self._save(tensors)
        after.path.unlink()

    def _outside(self) -> None:
        """The gradients of what comes before the blocks, and of an embedding that is also the head."""
        walker = self.walker
        walker.load(walker.embedding)
        keys = of_kind(self.request.want, "gradient")
        done = {name for name, _, key in (entry.rpartition(":") for entry in SafetensorsFile(self.file("head")).tensors) if key in keys}
        own = self._gradients([t for t in (*walker.embedding, *walker.small) if t.name not in done])
        with self.states("hidden", self.last).read() as rows, self.states("gradient", 0).read() as gradients:
            for index in self._each():
                ids, goals = self._tokens(index)
                hidden = walker.embed(ids)
                if hidden.requires_grad:
                    hidden.backward(gradients(index).to(walker.device))
                logits = walker.logits(rows(index).to(walker.device)) if walker.is_tied else hidden
                if walker.is_tied and logits.requires_grad:
                    self._loss(logits, goals).backward()
                own.take()
                self._finite(hidden, "the hidden states", "before the first block", index)
        walker.drop(walker.embedding)
        self._save(own.results(own.seen))

