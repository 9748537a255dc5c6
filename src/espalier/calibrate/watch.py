"""Which places of a model are watched, and the hooks that bring their rows and gradients to the statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.calibrate.statistics import STATISTICS, Kind, Statistic, Sums
from espalier.calibrate.walk import Walker

Tensors = dict[str, torch.Tensor]


def of_kind(want: Iterable[str], kind: Kind) -> list[str]:
    """The statistics among ``want`` that are of inputs, of outputs, or of gradients."""
    return [name for name in want if STATISTICS[name].kind == kind]


def is_watched(target: Target) -> bool:
    """Whether a parameter is the weight of a linear module (under any of its names) or of fused experts."""
    return "linear" in target.routes or target.route == "experts"


def places(walker: Walker, targets: Iterable[Target]) -> dict[str, dict[str, list[int]]]:
    """By kind: the name of each place and its shape, ``(*experts, features)`` or the stored parameter's."""
    found: dict[str, dict[str, list[int]]] = {"input": {}, "output": {}, "gradient": {}}
    for target in targets:
        found["gradient"][target.name] = list(walker.parameter(target).shape)
        if is_watched(target):
            found["input"][target.site] = [*target.lead, target.inputs]
            found["output"][target.name] = [*target.lead, target.outputs]
    return found


class Recorder:
    """Hooks on linear modules and fused experts that add up what they read and give, while ``is_on``.

    Siblings that read the same input (q, k and v; gate and up) are one site, watched at the first of them.
    """

    def __init__(self, walker: Walker, targets: Iterable[Target], want: Sequence[str], rank: int) -> None:
        self.is_on = True
        self.inputs: dict[str, Sums] = {}
        self._outputs: dict[str, Sums] = {}
        self._remove: list[Callable[[], object]] = []
        of_input, of_output = of_kind(want, "input"), of_kind(want, "output")
        for target in filter(is_watched, targets):
            put_input = put_output = None
            if target.site not in self.inputs:
                sums = self.inputs[target.site] = Sums(of_input, (*target.lead, target.inputs), rank, walker.device)
                put_input = sums.put
            if of_output:
                sums = self._outputs[target.name] = Sums(of_output, (*target.lead, target.outputs), rank, walker.device)
                put_output = sums.put
            self._install(walker, target, put_input, put_output)

    def _install(self, walker: Walker, target: Target, put_input: Any, put_output: Any) -> None:
        def show(rows: torch.Tensor, outputs: torch.Tensor, expert: int = 0) -> None:
            if self.is_on:
                if put_input is not None:
                    put_input(rows, expert)
                if put_output is not None:
                    put_output(outputs, expert)

        if target.route == "experts":
            path, _, local = target.name.rpartition(".")
            watches = walker.model.get_submodule(path).__dict__.setdefault("_espalier_watches", {})
            watches[local] = lambda expert, rows, outputs: show(rows, outputs, expert)
            self._remove.append(watches.clear)
            return
        name = target.names[target.routes.index("linear")]
        module = walker.model.get_submodule(name.rpartition(".")[0])
        self._remove.append(module.register_forward_hook(lambda module, args, output: show(args[0], output)).remove)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for remove in self._remove:
            remove()

    def switch_on(self) -> None:
        """Record from here on."""
        self.is_on = True

    def add_up(self) -> None:
        """Add the rows that wait to the statistics."""
        for sums in (*self.inputs.values(), *self._outputs.values()):
            sums.add_up()

    def results(self) -> tuple[Tensors, dict[str, list[int]]]:
        """The statistics of every place that a token came to, and the tokens per input site."""
        self.add_up()
        both = (*self.inputs.items(), *self._outputs.items())
        tensors = {f"{name}:{key}": value for name, sums in both if any(sums.tokens) for key, value in sums.results().items()}
        return tensors, {name: sums.tokens for name, sums in self.inputs.items() if any(sums.tokens)}


class Gradients:
    """The statistics of the gradients of some parameters, which take gradients from here on."""

    def __init__(self, walker: Walker, targets: Iterable[Target], want: Sequence[str], rank: int) -> None:
        self.seen: set[str] = set()
        self._parameters = {target.name: walker.parameter(target).requires_grad_() for target in targets}
        self._sums: dict[str, dict[str, Statistic]] = {
            name: {key: STATISTICS[key](tuple(parameter.shape), rank, walker.device) for key in of_kind(want, "gradient")}
            for name, parameter in self._parameters.items()
        }

    def take(self) -> None:
        """Add one sequence's gradients, and clear them."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.seen.add(name)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for statistic in self._sums[name].values():
                statistic.add(gradient)
            parameter.grad = None

    def results(self, names: Iterable[str] | None = None) -> Tensors:
        """The statistics of all parameters, or of those that have a gradient at all."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        kept = self._sums if names is None else {name: self._sums[name] for name in sorted(names)}
        return {f"{name}:{key}": statistic.result() for name, sums in kept.items() for key, statistic in sums.items()}
