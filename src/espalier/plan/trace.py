"""How many bytes a training step holds at its worst, found by running it on tensors without data.

The real model class, the real method and the real loss run forward and backward under torch's fake
tensors, which have shapes and no storage; every allocation and release is counted. So the answer follows
the code, for any family and method, and costs a second or two whatever the model's size.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.anatomy.classification import classifies
from espalier.attach.attachment import (
    Attachment,
    attach,
    attach_updates,
    attachments,
    release_base,
    trainable_parameters,
)
from espalier.attach.coded import CodedWeight
from espalier.attach.coded_base import quantize_base
from espalier.attach.course import Course
from espalier.attach.method import Adapter
from espalier.attach.tasks import choose_task, tasks_of
from espalier.delta.forms import Update
from espalier.errors import EspalierError
from espalier.kernels.philox import Numberless
from espalier.memory.in_backward import InBackward
from espalier.memory.training_form import training_form

Gradients = Literal["all", "few", "none"]
"""How many gradients of a step are there at once: of all parameters, of those that are being moved, or none."""


def _even_counts(numbers: torch.Tensor, weights: Any = None, minlength: int = 0) -> torch.Tensor:
    """What ``bincount`` would give on even routing: how many tokens each expert gets is all that a step reads of its data."""
    with unset_fake_temporarily():
        return torch.arange(minlength).add(numbers.numel()).div(minlength, rounding_mode="floor")


def _even_places(numbers: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """What ``searchsorted`` would give for bounds at even distances: where the experts' parts of one support begin."""
    with unset_fake_temporarily():
        return torch.arange(values.numel()).mul(numbers.numel()).div(max(1, values.numel() - 1), rounding_mode="floor")


def _one_each(repeats: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """What ``repeat_interleave`` would give if rows of an embedding had one entry of a support each: they have few."""
    return torch.arange(repeats.numel(), device=repeats.device)


def _grouped_product(a: torch.Tensor, b: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """``_grouped_mm`` of any dtype: what torch knows of its shapes, it knows for bfloat16 only."""
    return torch.ops.aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *rest, **more).to(a.dtype)


_STAND_INS = {
    torch.ops.aten.bincount.default: _even_counts,
    torch.ops.aten.searchsorted.Tensor: _even_places,
    torch.ops.aten.repeat_interleave.Tensor: _one_each,
    torch.ops.aten._grouped_mm.default: _grouped_product,
}
"""What runs in the place of operators that need numbers, or that fake tensors do not know well."""


@dataclass
class _Block:
    """A storage that an operator made: its bytes, when it was made and dropped, and whether it has a column for every token."""

    nbytes: int
    born: int
    is_logits: bool
    died: int | None = None


@dataclass(frozen=True)
class Held:
    """Bytes that a step holds at its worst moment, by kind."""

    activations: int
    logits: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.gradients


class _Ledger(TorchDispatchMode):
    """Writes down the storages that operators make, and when they go; views of the tensors that are there are none."""

    def __init__(self, there: Iterable[torch.Tensor] = (), vocabulary: int = 0) -> None:
        super().__init__()
        self.blocks: list[_Block] = []
        self._clock, self._vocabulary = 0, vocabulary
        self._seen: dict[int, int] = {}
        self._there = [tensor.untyped_storage() for tensor in there]  # kept, so that no other gets their addresses
        self._known = {storage._cdata for storage in self._there}

    def _add(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen and key not in self._known:
            self._clock += 1
            self._seen[key] = len(self.blocks)
            self.blocks.append(_Block(storage.nbytes(), self._clock, tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary))
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._clock += 1
        if (number := self._seen.pop(key, None)) is not None:
            self.blocks[number].died = self._clock

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _STAND_INS.get(function, function)(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._add(leaf)
        return result

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Which block a living tensor's storage is."""
        return self._seen.get(tensor.untyped_storage()._cdata)

    def worst(self, gradients: Collection[int], accumulating: bool) -> Held:
        """The worst moment.

        Args:
            gradients: the blocks that are gradients of what is trained.
            accumulating: whether all of these are there from the start, of a micro-batch before, and new ones are added to them.
        """
        whole = sum(self.blocks[number].nbytes for number in gradients) if accumulating else 0
        now, worst = [0, 0, whole], Held(0, 0, whole)
        events = [(block.born, 1, number) for number, block in enumerate(self.blocks)]
        events += [(block.died, -1, number) for number, block in enumerate(self.blocks) if block.died is not None]
        for _, sign, number in sorted(events):
            block = self.blocks[number]
            kind = 2 if number in gradients else int(block.is_logits)
            now[kind] += sign * block.nbytes
            if sum(now) > worst.total:
                worst = Held(*now)
            if accumulating and kind == 2:
                now[kind] -= sign * block.nbytes
        return worst


@dataclass(frozen=True)
class Traced:
    """One training step: bytes of the frozen ``model``, shapes of what is trained by name, and what forward and backward hold.

    Args:
        moving: shapes of those that move at a time, at most.
        gradients: bytes of all of them, when the optimizer is about to move what trains.
        held: of a step of one micro-batch; ``accumulated``: of one of several.
        exported: bytes of the tensors that are made to store what was trained.
    """

    model: int
    shapes: dict[str, tuple[int, ...]]
    moving: dict[str, tuple[int, ...]]
    gradients: int
    held: Held
    accumulated: Held
    exported: int

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return numbers(self.shapes)

    @property
    def peak(self) -> int:
        """Bytes that a step of one micro-batch allocates at its worst, gradients included; parameters and optimizer are not."""
        return self.held.total


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes have."""
    return sum(math.prod(shape) for shape in shapes.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def trace_step(
    config: Any,
    method: Any,
    options: dict[str, Any],
    *,
    dtype: torch.dtype,
    tokens: int,
    sequence_length: int,
    recompute: bool,
    chunk: int,
    base_bits: int | None = None,
    gradients: Gradients = "all",
    over: Sequence[Mapping[str, Update]] = (),
    steps: int | None = None,
) -> Traced:
    """Run one step of ``tokens`` tokens without data, packed where the family can be, else padded, as classifiers are.

    Args:
        config: a transformers config.
        method: the adaptation method; ``options`` are the other arguments of ``attach``.
        dtype: of the model.
        tokens: a multiple of ``sequence_length``; windows are taken to be that long.
        chunk: tokens whose logits are held at a time.
        base_bits: of the codes that the frozen weights are kept as, if they are.
        gradients: how many of the step's are there at once.
        over: updates of the frozen deltas that the method stands on, innermost first.
        steps: of the run, if that is known.

    Raises:
        EspalierError: when transformers cannot make the model of the config, the method cannot be put on it, or it cannot
            do what it promises in so many steps.
    """
    arguments = (config, method, options, dtype, tokens, sequence_length, recompute, chunk, base_bits, gradients, over, steps)
    if classifies(config):
        return _trace(*arguments, padded=True)
    try:
        return _trace(*arguments, padded=False)
    except (RuntimeError, TypeError, ValueError):  # what attention that cannot be packed says: see packed_attention.packs
        return _trace(*arguments, padded=True)


def _trace(
    config: Any, method: Any, options: dict[str, Any], dtype: torch.dtype, tokens: int, sequence_length: int,
    recompute: bool, chunk: int, base_bits: int | None, gradients: Gradients, over: Sequence[Mapping[str, Update]], steps: int | None, padded: bool,
) -> Traced:  # fmt: skip
    import transformers

    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            auto: Any = transformers.AutoModelForSequenceClassification if classifies(config) else transformers.AutoModelForCausalLM
            model = auto.from_config(copy.deepcopy(config), dtype=dtype)
        except (ValueError, KeyError) as error:
            what = "sequence classifier" if classifies(config) else "causal language model"
            raise EspalierError(f"transformers cannot make a {what} of this config: {error}") from error
        coded: set[str] = set()
        if base_bits is not None:
            quantize_base(model, base_bits)
            coded = {name.replace("espalier_base.", "") for name, module in model.named_modules() if isinstance(module, CodedWeight)}
        for number, updates in enumerate(over):
            attach_updates(model, updates, f"delta{number}")
        attach(model, method, **options, streams=Numberless)
        release_base(model)
        for task in tasks_of(model)[:1]:  # whichever: they are alike in size
            choose_task(model, task)
        *_, attached = attachments(model).values()
        if coded and coded <= {name for name, slot in attached.slots.items() if slot.update().ignores_base}:
            raise EspalierError(
                f"--base-bits keeps frozen weights as codes, and {method.name} trains all {len(coded)} of these itself; leave it out, or take a "
                "method that adds to frozen weights, such as lora"
            )
        if method.needs == "pruned" and (lost := sorted(coded & attached.slots.keys())):
            raise EspalierError(
                f"--base-bits keeps {lost[0]} as codes, which do not keep its zeros, and {method.name} goes by these ({len(lost)} such); "
                "leave it out, or what is kept as codes out of --targets"
            )
        trained = trainable_parameters(model)
        if not trained:
            raise EspalierError(f"{method.name} with these options trains nothing; give other --targets, or another share")
        if steps is not None:
            Course(model, steps).check()
        moving = _let_move(attached)
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        theirs = {id(p) for p in trained.values()}
        frozen = [t for t in (*model.parameters(), *model.buffers()) if not (id(t) in theirs or t.is_meta)]
        total = sum(t.numel() * t.element_size() for t in frozen)
        rows = max(1, tokens // sequence_length)
        shape = (rows, sequence_length) if padded else (1, tokens)
        ids = torch.zeros(shape, dtype=torch.int64)
        inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if not padded:
            inputs = {"position_ids": ids, "segment_lengths": (sequence_length,) * rows}
        model.train()
        ledger = _Ledger([*model.parameters(), *model.buffers()], config.vocab_size)
        freeing = InBackward({name: p for name, p in trained.items() if p.requires_grad}, lambda some: None) if gradients == "few" else contextlib.nullcontext()
        with training_form(model, chunk=chunk, recompute=recompute, padded=padded), torch.set_grad_enabled(gradients != "none"), freeing, ledger:
            loss = model(input_ids=ids, targets=ids[:, 0] if classifies(config) else ids.reshape(-1), scale=1.0, **inputs)
            if gradients != "none":
                loss.backward()
        there = {n for p in trained.values() if p.grad is not None and (n := ledger.number_of(p.grad)) is not None}
        held, accumulated = (ledger.worst(there, accumulating) for accumulating in (False, True))
        moved = {name: shape for name, shape in shapes.items() if id(trained[name]) in moving}
        whole = sum(ledger.blocks[number].nbytes for number in there)
        return Traced(total, shapes, moved, whole, held, accumulated, _exported(attached, numbers(shapes)))


def _let_move(attached: Attachment) -> set[int]:
    """Let only what moves at a time require gradients, as in the step that moves the most; the ids of these parameters."""
    method = attached.method
    if isinstance(method, Adapter):
        moving = {target.name for target in method.moving(attached.targets)}
        for target in attached.targets:
            if target.name not in moving:
                attached.slots[target.name].requires_grad_(False)
    modules = [*attached.slots.values(), *attached.branches.values(), *([attached.pool] if attached.pool is not None else [])]
    return {id(p) for module in modules for p in module.parameters() if p.requires_grad}


def _exported(attached: Attachment, trained: int) -> int:
    """Bytes that storing what was trained takes beside it; as much again where that depends on numbers."""
    ledger = _Ledger([t for module in (*attached.slots.values(), *attached.branches.values()) for t in (*module.parameters(), *module.buffers())])
    try:
        with ledger:
            kept = attached.updates(), attached.stored_branches()
    except RuntimeError:  # which operators that need numbers raise in several ways
        return 4 * trained
    del kept
    return ledger.worst((), False).total
