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
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from espalier.anatomy.layout import locate
from espalier.anatomy.parameters import BLOCK, parameters
from espalier.anatomy.target import Target
from espalier.attach.load import MALFORMED, load_config
from espalier.attach.routes import ExpertsRoute, adapted_class
from espalier.checkpoint.directory import ModelDirectory
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters on the meta device, and buffers (rotary frequencies, say) with their numbers."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is there already may be a tied one
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _skeleton(directory: ModelDirectory, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    config = load_config(directory.path)
    try:
        with _parameters_on_meta():
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except MALFORMED as error:
        raise EspalierError(f"transformers cannot make a causal language model of {directory.path}: {error}") from error


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


class Walker:
    """A model whose parts are read when they are needed.

    Args:
        directory: of the model.
        dtype: to compute in.
        device: where parts run.

    ``blocks`` are its blocks in order, ``inside[i]`` the parameters of block i, ``embedding``, ``head`` and
    ``small`` those outside (``small`` stay in memory). ``most_resident`` is the largest number of bytes of
    parameters that were in memory at once.

    Raises:
        EspalierError: when the model cannot be made, lacks a tensor, or cannot be walked.
    """

    def __init__(self, directory: ModelDirectory, dtype: torch.dtype, device: torch.device) -> None:
        self.directory, self.dtype, self.device = directory, dtype, device
        self.model: Any = _skeleton(directory, dtype)
        self.resident = self.most_resident = 0
        self.targets = parameters(self.model)
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
        self._read_buffers()
        self.load(self.small)
        self._calls: tuple[int, list[Call]] = (0, [])
        self._wraps = False
        self.width = self._find_width()

    def refuse(self, why: str) -> NoReturn:
        raise EspalierError(f"{type(self.model).__name__} cannot be walked block by block: {why}")

    # -- what there is

    def _find_blocks(self) -> tuple[list[Any], list[list[Target]]]:
        inside: dict[int, list[Target]] = {}
        stacks = set()
        for target in self.targets:
            found = {match for name in target.names if (match := BLOCK.search(name))}
            stacks |= {match.string[: match.start(1) - 1] for match in found}
            if found and {match.group(1) for match in found} != {str(target.block)}:
                self.refuse(f"its blocks share {target.name}")
            if target.block is not None:
                inside.setdefault(target.block, []).append(target)
        if len(stacks) != 1:
            self.refuse(f"it has {len(stacks)} stacks of blocks ({', '.join(sorted(stacks)) or 'none found'}); one is needed")
        blocks = list(self.model.get_submodule(stacks.pop()))
        return blocks, [inside.get(index, []) for index in range(len(blocks))]

    def path(self, index: int) -> str:
        """The name of a block."""
        found = BLOCK.search(self.inside[index][0].name)
        return found.string[: found.end(1)] if found else str(index)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, local = name.rpartition(".")
        return self.model.get_submodule(path), local

    def parameter(self, target: Target) -> nn.Parameter:
        """The parameter as the model has it now, with its numbers or on the meta device."""
        owner, local = self._owner(target.name)
        return owner._parameters[local]  # type: ignore[return-value]

    # -- numbers

    def load(self, targets: Iterable[Target]) -> None:
        """Read parameters from disk."""
        for target in targets:
            tensor = self._read(target).to(self.device, self.dtype)
            self._set(target, nn.Parameter(tensor, requires_grad=False))
            self.resident += tensor.nbytes
        self.most_resident = max(self.resident, self.most_resident)

    def drop(self, targets: Iterable[Target]) -> None:
        """Forget the numbers of parameters, and their gradients."""
        for target in targets:
            parameter = self.parameter(target)
            self.resident -= 0 if parameter.is_meta else parameter.nbytes
            self._set(target, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    def _set(self, target: Target, parameter: nn.Parameter) -> None:
        for name in target.names:
            owner, local = self._owner(name)
            owner._parameters[local] = parameter

    def _read(self, target: Target) -> torch.Tensor:
        shape = tuple(self.parameter(target).shape)
        pieces = locate(target.name, target.names, target.lead[0] if target.lead else None, self.directory)
        if pieces[0].expert is None:
            return self._stored(pieces[0].names[0], shape)
        rows = shape[1] // len(pieces[0].names)
        fused: torch.Tensor | None = None
        for piece in pieces:
            for position, name in enumerate(piece.names):
                part = self._stored(name, (rows, *shape[2:]))
                fused = torch.empty(shape, dtype=part.dtype) if fused is None else fused
                fused[piece.expert, position * rows : (position + 1) * rows] = part
        assert fused is not None
        return fused

    def _stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        found = self.directory.info(name).shape
        if found != shape:
            raise EspalierError(f"{self.directory.path}: tensor {name!r} has shape {list(found)}, the config makes it {list(shape)}")
        return self.directory.read(name)

    def _read_buffers(self) -> None:
        persistent = self.model.state_dict(keep_vars=True)
        for name, buffer in list(self.model.named_buffers()):
            owner, local = self._owner(name)
            if name in persistent:
                (piece, *_) = locate(name, (), None, self.directory)
                buffer = self._stored(piece.names[0], tuple(buffer.shape)).to(buffer.dtype)
            owner._buffers[local] = buffer.to(self.device)

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
            self.refuse("it has no token embedding or no language-model head")
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
        self.refuse("what a block returns is not what the next one gets")

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
                self.refuse("its blocks are told something that depends on the tokens")
            raise _Reached(hidden)

        try:
            with self._standing_in(stop):
                self.model(input_ids=ids[None], use_cache=False)
        except _Reached as reached:
            return reached.args[0]
        self.refuse("its forward pass does not reach its blocks")

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
