"""How a forward pass reaches a branch: one kind of slot for each place, which hooks itself into the model.

Which slot a site gets depends on its place alone; no method is named here. Hooks are bound methods of the slot, so that
a copied model has hooks of its own. A slot that is not active changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier.anatomy.site import Site, backbone_path, block_paths
from espalier.attach import attention
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.attach.slot import Held, Pool, versions


class View:
    """What :meth:`Branch.branch` sees of a slot: its tensors in the dtype of what they meet, and facts."""

    def __init__(self, slot: BranchSlot, dtype: torch.dtype | None, **facts: Any) -> None:
        tensors = slot.meant()
        self.site, self.training, self.names = slot.site, slot.training, tuple(tensors)
        self.context = slot.pool.context_of(slot.site) if slot.pool is not None else None
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
        for name, fact in facts.items():
            setattr(self, name, fact)


class BranchSlot(Held):
    """One branch at one site."""

    _meant: tuple[Any, Tensors] | None = None

    def __init__(self, method: Branch, site: Site, tensors: Tensors, pool: Pool | None, scale: float, dropout: float, device: torch.device) -> None:
        super().__init__(tensors, method.gain(site) * scale, pool, dropout, device)
        self.method, self.site, self.scale = method, site, scale
        self.strength = 1.0
        """What it is multiplied by at run time, beside ``scale``; it is a part of the gain."""
        self.active = True
        self._handles: list[Any] = []

    def meant(self) -> Tensors:
        """The tensors of this forward pass; where they are made of others, kept in evaluation until one of those changes."""
        kept = type(self.method).tensors is not Branch.tensors and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        key = versions([getattr(self, name) for name in self.names]) if kept else None
        if key is None:
            self._meant = None
            return self.method.tensors(self)
        if self._meant is None or self._meant[0] != key:
            self._meant = (key, self.method.tensors(self))
        return self._meant[1]

    def install(self, model: nn.Module) -> None:
        """Hook into the model."""
        raise NotImplementedError

    def lead(self, model: nn.Module) -> None:
        """Hook in what the branches of one method at this place do once for the whole model."""

    def remove(self, model: nn.Module) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class SublayerSlot(BranchSlot):
    """Changes what a sublayer gives, from that or from what it is given."""

    _given: torch.Tensor | None = None

    def install(self, model: nn.Module) -> None:
        owner, reads = self.site.owner, self.site.reads
        writing = model.get_submodule(owner).register_forward_hook(self._write)
        self._handles.append(writing)
        if self.method.insertion == "parallel":
            self._handles.append(model.get_submodule(reads).register_forward_pre_hook(self._read, with_kwargs=True))
            # recomputation may stop between reading and writing; then nothing is to be left
            shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(owner.split("."), reads.split("."), strict=False))
            around = ".".join(part for part, _ in shared)
            self._handles.append(model.get_submodule(around).register_forward_hook(self._forget, always_call=True))

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            self._given = args[0] if args else next(iter(kwargs.values()))

    def _forget(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._given = None

    def _write(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self.active:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        x = hidden if self._given is None else self._given
        self._given = None
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        changed = hidden + self.gain * self.method.branch(View(self, x.dtype), x)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class HeadsSlot(BranchSlot):
    """Adds to the softmax of attention; see ``attach/attention.py``."""

    def install(self, model: nn.Module) -> None:
        attention.install()
        model.get_submodule(self.site.owner).__dict__.setdefault("_espalier_heads", []).append(self)

    def lead(self, model: nn.Module) -> None:
        if self.method.positions():
            backbone = model.get_submodule(backbone_path(model))
            self._handles.append(backbone.register_forward_pre_hook(self._shift, with_kwargs=True))

    def _shift(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Move the positions of all tokens behind those that the branch takes."""
        if not self.active:
            return None
        arguments = named_inputs(args, kwargs)
        positions = arguments.get("position_ids")
        if positions is None:
            tokens = arguments.get("input_ids")
            tokens = arguments["inputs_embeds"] if tokens is None else tokens
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + cached(arguments))[None]
        return (), {**arguments, "position_ids": positions + self.method.positions()}

    def remove(self, model: nn.Module) -> None:
        super().remove(model)
        own = model.get_submodule(self.site.owner).__dict__
        own["_espalier_heads"].remove(self)
        if not own["_espalier_heads"]:
            del own["_espalier_heads"]

    def terms(self, query: torch.Tensor, scaling: float, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Numerator, denominator and logarithm of the scale that the branch adds."""

        def cap(logits: torch.Tensor) -> torch.Tensor:
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap

        part = View(self, query.dtype, scaling=scaling, cap=cap, wide=torch.promote_types(query.dtype, torch.float32))
        return self.method.branch(part, query)


class EmbeddingSlot(BranchSlot):
    """Puts vectors in front of every sequence, and takes their places out of what the model gives.

    Labels, losses, logits and whatever else is made of the last hidden states never see them. In a packed row every
    window gets them. With a cache, they are in it after the first call; later calls only move the positions.
    """

    _kept: torch.Tensor | None = None

    def install(self, model: nn.Module) -> None:
        owner = model.get_submodule(self.site.owner)
        self._handles.append(owner.register_forward_pre_hook(self._insert, with_kwargs=True))
        # the branch that came last is outermost
        self._handles.append(owner.register_forward_hook(self._strip, prepend=True))

    @property
    def acts(self) -> bool:
        return self.active and self.scale != 0

    def _insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._kept = None
        if not self.acts:
            return None
        arguments = named_inputs(args, kwargs)
        count, seen = self.method.positions(), cached(arguments)
        mask, lengths = arguments.get("attention_mask"), arguments.get("segment_lengths")
        if mask is not None:
            if mask.dim() != 2:
                raise RuntimeError(f"{self.method.name} needs an attention mask of (batch, tokens), not one of shape {tuple(mask.shape)}")
            arguments["attention_mask"] = torch.cat((mask.new_ones(mask.shape[0], count), mask), 1)
        if seen:
            if (positions := arguments.get("position_ids")) is not None:
                arguments["position_ids"] = positions + count
            return (), arguments
        tokens = arguments.pop("input_ids", None)
        embedded = arguments.get("inputs_embeds")
        if embedded is None:
            embedded = module.get_input_embeddings()(tokens)  # type: ignore[operator]
        front = self.method.branch(View(self, embedded.dtype))[None].expand(len(embedded), -1, -1)
        windows = lengths or (embedded.shape[1],)

        def lengthened(tensor: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            """(batch, tokens, ...) with ``prompt`` in front of every window."""
            return torch.cat([part for window in tensor.split(windows, 1) for part in (prompt, window)], 1)

        arguments["inputs_embeds"] = lengthened(embedded, front)
        if (positions := arguments.get("position_ids")) is not None:
            first = torch.arange(count, device=positions.device).expand(len(positions), -1)
            arguments["position_ids"] = lengthened(positions + count, first.to(positions.dtype))
        if (types := arguments.get("token_type_ids")) is not None:
            arguments["token_type_ids"] = lengthened(types, types.new_zeros(len(types), count))
        if lengths is not None:
            arguments["segment_lengths"] = tuple(length + count for length in lengths)
        device = embedded.device
        places = torch.arange(embedded.shape[1], device=device)[None]
        self._kept = lengthened(places, torch.full((1, count), -1, device=device))[0].ge(0).nonzero()[:, 0] if lengths else places[0] + count
        return (), arguments

    def _strip(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        kept, self._kept = self._kept, None
        if kept is None:
            return output
        if isinstance(output, tuple):
            return (output[0][:, kept], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, kept]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(hidden[:, kept] for hidden in output["hidden_states"])
        return output


def named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward by name; ids and mask may come by position."""
    return {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}


def cached(arguments: dict[str, Any]) -> int:
    """How many tokens a forward pass goes on from."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


class ModelSlot(BranchSlot):
    """Changes the last hidden state, from those between the blocks; it stands outside the model's own graph."""

    def install(self, model: nn.Module) -> None:
        machine = self.method.machine(self.site)
        for module in machine.modules() if machine is not None else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self.__dict__["_machine"] = machine  # not a child: it has no numbers
        self._move_machine(lambda tensor: tensor.to(self.gain.device))
        self._hidden: list[torch.Tensor] = []
        self._arguments: dict[str, Any] = {}
        owner = model.get_submodule(self.site.owner)
        blocks = [model.get_submodule(path) for path in block_paths(model)]
        self._handles.append(owner.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(blocks[0].register_forward_pre_hook(self._first, with_kwargs=True))
        self._handles += [block.register_forward_hook(self._gave) for block in blocks]
        self._handles.append(owner.register_forward_hook(self._write))

    def _move_machine(self, fn: Any) -> None:
        machine: nn.Module | None = self.__dict__.get("_machine")
        for module in machine.modules() if machine is not None else ():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(fn(buffer).device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._move_machine(fn)
        return self

    def remove(self, model: nn.Module) -> None:
        super().remove(model)
        del self.__dict__["_machine"]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden.clear()
        self._arguments = {name: value for name, value in named_inputs(args, kwargs).items() if name not in ("input_ids", "inputs_embeds", "return_dict")}

    def _first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            self._hidden.append((args[0] if args else kwargs["hidden_states"]).detach())

    def _gave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.active:
            self._hidden.append((output[0] if isinstance(output, tuple) else output).detach())

    def _write(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden, arguments = list(self._hidden), self._arguments
        self._hidden.clear()
        self._arguments = {}
        if not hidden:
            return output
        last = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
        arguments["past_key_values"] = None if isinstance(output, tuple) else output.get("past_key_values")
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        part = View(self, last.dtype, machine=self._machine, implementation=implementation)
        changed = last + self.gain * self.method.branch(part, hidden, arguments)
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output["last_hidden_state"] = changed
        return output


PLACES: dict[str, Callable[..., BranchSlot]] = {
    "sublayer": SublayerSlot, "heads": HeadsSlot, "embedding": EmbeddingSlot, "model": ModelSlot,
}  # fmt: skip
"""Place -> its kind of slot."""
