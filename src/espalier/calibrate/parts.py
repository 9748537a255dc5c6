"""A model built from its config, whose parameters have shapes and get their numbers from disk when they are needed.

Buffers (rotary frequencies, say) that are no part of the files have the numbers that the model's own code gives them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.anatomy.layout import locate
from espalier.anatomy.parameters import parameters
from espalier.anatomy.target import Target
from espalier.attach.load import MALFORMED, load_config
from espalier.checkpoint.directory import ModelDirectory
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters on the meta device, and buffers (rotary frequencies, say) with their numbers."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is there already may be a tied one
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
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


class Parts:
    """A model of which only the parameters that were loaded are in memory.

    ``targets`` are its parameters; ``most_resident`` is the largest number of bytes of them that were in memory at once.

    Raises:
        EspalierError: when the model cannot be made, or lacks a buffer.
    """

    def __init__(self, directory: ModelDirectory, dtype: torch.dtype, device: torch.device) -> None:
        self.directory, self.dtype, self.device = directory, dtype, device
        self.model: Any = _skeleton(directory, dtype)
        self.resident = self.most_resident = 0
        self.targets = parameters(self.model)
        self._read_buffers()

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, local = name.rpartition(".")
        return self.model.get_submodule(path), local

    def parameter(self, target: Target) -> nn.Parameter:
        """The parameter as the model has it now, with its numbers or on the meta device."""
        owner, local = self._owner(target.name)
        return owner._parameters[local]  # type: ignore[return-value]

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
