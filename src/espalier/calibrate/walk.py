"""Walking a causal language model from disk one block at a time, forwards and backwards.

The model is built from its config with parameters that have shapes and no numbers; a part's numbers are read
when the part runs and dropped after it. Nothing here knows a family: the model's own forward is run with
something else standing in for its blocks, which shows what each block is called with (masks, position
embeddings), what comes before the first one and what after the last. Sequences run one by one, without padding,
so that no number depends on what else is in a batch. Not for models whose blocks are no chain, or are
told something that depends on the tokens; they are refused by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from espalier.anatomy.parameters import BLOCK
from espalier.anatomy.target import Target
from espalier.attach.routes import ExpertsRoute, adapted_class
from espalier.calibrate.parts import Parts
from espalier.checkpoint.directory import ModelDirectory
from espalier.errors import EspalierError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside the hidden states."""


class _Reached(Exception):
    """Ends a forward pass at the place that it was run for."""


class WatchedExperts(ExpertsRoute):
    """Fused experts that run one by one and show ``_espalier_watches`` the rows and outputs of each."""

    def _experts(self, local: str) -> Any:
        apply = super()._experts(local)
        watch: Callable[..., None] | None = self.__dict__.get("_espalier_watches", {}).get(local)

        def watched(expert: int, rows: torch.Tensor) -> torch.Tensor:
            outputs = apply(expert, rows)
            if watch is not None:
                watch(expert, rows, outputs)
            return outputs

        return watched


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """The hidden states of a block's call, and the rest of it."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


class Walker(Parts):
    """A model whose parts are read when they are needed.

    Args:
        directory: of the model.
        dtype: to compute in.
        device: where parts run.

    ``blocks`` are its blocks in order, ``inside[i]`` the parameters of block i, ``embedding``, ``head`` and
    ``small`` those outside (``small`` stay in memory).

    Raises:
        EspalierError: when the model cannot be made, lacks a tensor, or cannot be walked.
    """

    def __init__(self, directory: ModelDirectory, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(directory, dtype, device)
        self.blocks, self.inside = self._find_blocks()
        outside = [target for target in self.targets if target.block is None]
        self.embedding = [target for target in outside if "embedding" in target.roles]
        self.head = [target for target in outside if any(role.split(".")[0] == "head" for role in target.roles)]
        self.small = [target for target in outside if target not in self.embedding and target not in self.head]
        self.is_tied = any(target in self.head for target in self.embedding)
        for module in list(self.model.modules()):
            if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
                module.__dict__["_espalier"] = {}
                module.__class__ = adapted_class(type(module), WatchedExperts, frozenset())
        self.load(self.small)
        self._calls: tuple[int, list[Call]] = (0, [])
        self._wraps = False
        self.width = self._find_width()

    def refusal(self, why: str) -> EspalierError:
        return EspalierError(f"{type(self.model).__name__} cannot be walked block by block: {why}")

    # -- what there is

    def _find_blocks(self) -> tuple[list[Any], list[list[Target]]]:
        inside: dict[int, list[Target]] = {}
        stacks = set()
        for target in self.targets:
            found = {match for name in target.names if (match := BLOCK.search(name))}
            stacks |= {match.string[: match.start(1) - 1] for match in found}
            if found and {match.group(1) for match in found} != {str(target.block)}:
                raise self.refusal(f"its blocks share {target.name}")
            if target.block is not None:
                inside.setdefault(target.block, []).append(target)
        if len(stacks) != 1:
            raise self.refusal(f"it has {len(stacks)} stacks of blocks ({', '.join(sorted(stacks)) or 'none found'}); one is needed")
        blocks = list(self.model.get_submodule(stacks.pop()))
        return blocks, [inside.get(index, []) for index in range(len(blocks))]

    def path(self, index: int) -> str:
        """The name of a block."""
        found = BLOCK.search(self.inside[index][0].name)
        return found.string[: found.end(1)] if found else str(index)

    # -- forward passes of which the blocks are no part

    @contextlib.contextmanager
    def _standing_in(self, stand_in: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Call ``stand_in(index, hidden, call)`` wherever the model calls a block."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            result = stand_in(index, *_hidden(args, kwargs))
            return (result,) if self._wraps else result

        for index, block in enumerate(self.blocks):
            block.forward = functools.partial(forward, index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _run_without_tokens(self, length: int) -> Any:
        """The model's forward on embeddings that are all zero, for what does not depend on the tokens."""
        width = self.parameter(self.embedding[0]).shape[1]
        zeros = torch.zeros(1, length, width, dtype=self.dtype, device=self.device)
        return self.model(inputs_embeds=zeros, use_cache=False)

    def _find_width(self) -> int:
        """Width of the hidden states; finds out whether blocks return them in a tuple, and that each block's go to the next."""
        if not self.embedding or not self.head:
            raise self.refusal("it has no token embedding or no language-model head")
        marks: list[torch.Tensor] = []

        def mark(index: int, hidden: Any, call: Call) -> torch.Tensor:
            if index != len(marks) or (marks and not _same(hidden, marks[-1])):
                raise _Reached(False)
            marks.append(torch.full_like(hidden, index + 1))
            if len(marks) == len(self.blocks):
                raise _Reached(True)
            return marks[-1]

        for self._wraps in (False, True):
            marks.clear()
            try:
                with self._standing_in(mark), torch.no_grad():
                    self._run_without_tokens(3)
            except _Reached as reached:
                if reached.args[0]:
                    return marks[0].shape[-1]
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
                continue
        raise self.refusal("what a block returns is not what the next one gets")

    def calls(self, length: int) -> list[Call]:
        """What each block is called with for a sequence of so many tokens, hidden states left out."""
        if self._calls[0] != length:
            found: list[Call] = []

            def note(index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
                found.append(call)
                if len(found) == len(self.blocks):
                    raise _Reached
                return hidden

            with self._standing_in(note), torch.no_grad(), contextlib.suppress(_Reached):
                self._run_without_tokens(length)
            self._calls = (length, found)
        return self._calls[1]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states (1, n, width) that the first block gets for tokens (n,); needs ``embedding``."""
        expected = self.calls(len(ids))[0]

        def stop(index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
            if not _same(call, expected):
                raise self.refusal("its blocks are told something that depends on the tokens")
            raise _Reached(hidden)

        try:
            with self._standing_in(stop):
                self.model(input_ids=ids[None], use_cache=False)
        except _Reached as reached:
            return reached.args[0]
        raise self.refusal("its forward pass does not reach its blocks")

    def block(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states (1, n, width) after a block, from those before it."""
        args, kwargs = self.calls(hidden.shape[1])[index]
        result = self.blocks[index](hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    def logits(self, hidden: torch.Tensor, entered: Callable[[], None] = lambda: None) -> torch.Tensor:
        """The logits (n, vocabulary) from the hidden states after the last block; needs ``head``.

        ``entered`` is called when the last block is behind.
        """

        def give(index: int, before: torch.Tensor, call: Call) -> torch.Tensor:
            if index < len(self.blocks) - 1:
                return before
            entered()
            return hidden

        with self._standing_in(give):
            return self._run_without_tokens(hidden.shape[1]).logits[0]
