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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.anatomy.classification import classifies
from espalier.attach.attachment import attach, attach_updates, release_base, trainable_parameters
from espalier.attach.coded_base import quantize_base
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


class _Ledger(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live; views of the tensors that are there are none."""

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}
        self._there = [tensor.untyped_storage() for tensor in there]  # kept, so that no other gets their addresses
        self._known = {storage._cdata for storage in self._there}

    def _add(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen and key not in self._known:
            self._seen[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _STAND_INS.get(function, function)(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._add(leaf)
        return result


@dataclass(frozen=True)
class Traced:
    """One training step: bytes of the frozen ``model``, shapes of what is trained by name, bytes at its ``peak``.

    The peak is of what forward and backward allocate, gradients included; parameters and optimizer are not.
    """

    model: int
    shapes: dict[str, tuple[int, ...]]
    peak: int

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(shape) for shape in self.shapes.values())


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

    Raises:
        EspalierError: when transformers cannot make the model of the config.
    """
    arguments = (config, method, options, dtype, tokens, sequence_length, recompute, chunk, base_bits, gradients, over)
    if classifies(config):
        return _trace(*arguments, padded=True)
    try:
        return _trace(*arguments, padded=False)
    except (RuntimeError, TypeError, ValueError):  # what attention that cannot be packed says: see packed_attention.packs
        return _trace(*arguments, padded=True)


def _trace(
    config: Any, method: Any, options: dict[str, Any], dtype: torch.dtype, tokens: int, sequence_length: int,
    recompute: bool, chunk: int, base_bits: int | None, gradients: Gradients, over: Sequence[Mapping[str, Update]], padded: bool,
) -> Traced:  # fmt: skip
    import transformers

    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            auto: Any = transformers.AutoModelForSequenceClassification if classifies(config) else transformers.AutoModelForCausalLM
            model = auto.from_config(copy.deepcopy(config), dtype=dtype)
        except (ValueError, KeyError) as error:
            what = "sequence classifier" if classifies(config) else "causal language model"
            raise EspalierError(f"transformers cannot make a {what} of this config: {error}") from error
        if base_bits is not None:
            quantize_base(model, base_bits)
        for number, updates in enumerate(over):
            attach_updates(model, updates, f"delta{number}")
        attach(model, method, **options, streams=Numberless)
        release_base(model)
        for task in tasks_of(model)[:1]:  # whichever: they are alike in size
            choose_task(model, task)
        shapes = {name: tuple(p.shape) for name, p in trainable_parameters(model).items()}
        frozen = [t for t in (*model.parameters(), *model.buffers()) if not (t.requires_grad or t.is_meta)]
        total = sum(t.numel() * t.element_size() for t in frozen)
        rows = max(1, tokens // sequence_length)
        shape = (rows, sequence_length) if padded else (1, tokens)
        ids = torch.zeros(shape, dtype=torch.int64)
        inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if not padded:
            inputs = {"position_ids": ids, "segment_lengths": (sequence_length,) * rows}
        model.train()
        ledger = _Ledger([*model.parameters(), *model.buffers()])
        freeing = InBackward(trainable_parameters(model), lambda some: None) if gradients == "few" else contextlib.nullcontext()
        with training_form(model, chunk=chunk, recompute=recompute, padded=padded), torch.set_grad_enabled(gradients != "none"), freeing, ledger:
            loss = model(input_ids=ids, targets=ids[:, 0] if classifies(config) else ids.reshape(-1), scale=1.0, **inputs)
            if gradients != "none":
                loss.backward()
    return Traced(total, shapes, ledger.peak)
