"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from espalier.kernels.sharded import like, local
from espalier.memory.rule import Rule, Tensors, age_anew, corrections, evaluated, keep_dtypes
from espalier.registry import optimizer


class _Fused(torch.optim.AdamW):
    """Torch's fused kernel; parameters of which some numbers are younger than others go by the rule."""

    def __init__(self, rule: AdamW, groups: Any, **options: Any) -> None:
        self.rule = rule
        super().__init__(groups, **options)

    @torch.no_grad()
    def renew(
        self, parameter: torch.nn.Parameter, places: torch.Tensor, gradients: torch.Tensor | None, squares: torch.Tensor | None, steps: int
    ) -> None:
        """See :meth:`espalier.memory.rule.Ruled.renew`."""
        state, mask = self.state[parameter], local(like(parameter, places))
        seeds = self.rule.seeds(gradients, squares, steps) if gradients is not None and squares is not None else {}
        for slot in self.rule.slots:
            local(state[slot])[mask] = local(like(parameter, seeds[slot]))[mask] if seeds else 0.0
        age_anew(state, mask, steps if seeds else 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = evaluated(closure)  # which makes the gradients
        aged = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None and "age" in self.state[p]]
        for _, parameter, _ in aged:
            parameter.grad = None
        super().step()
        for group, parameter, gradient in aged:
            parameter.grad, state = gradient, self.state[parameter]
            for key in ("step", "age"):
                state[key] += 1
            slots = {slot: [local(state[slot])] for slot in self.rule.slots}
            (direction,) = self.rule.directions([local(gradient)], slots, [state["age"]])
            local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with the dtypes that were saved: an age is counted in float32."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)


@optimizer("adamw", ids=(), paper="arXiv:1711.05101")
class AdamW(Rule):
    """Adam with decoupled weight decay: ``w -= lr (m / (sqrt(v) + eps) + decay w)``; with its state in float32, torch's fused kernel.

    State: two numbers per trained number, and a step count per tensor. Decay acts on tensors of two or more dimensions only.
    """

    beta1: float = 0.9
    """decay of the mean of the gradients, in [0, 1)"""
    beta2: float = 0.95
    """decay of the mean of their squares, in [0, 1)"""
    epsilon: float = 1e-8
    """added to the root of the mean square, at least 0"""
    weight_decay: float = 0.0
    """decoupled decay per unit of learning rate, at least 0"""

    slots = {"exp_avg": True, "exp_avg_sq": False}

    def directions(self, gradients: Tensors, state: Mapping[str, Tensors], steps: Sequence[Any]) -> Tensors:
        means, squares = state["exp_avg"], state["exp_avg_sq"]
        torch._foreach_lerp_(means, gradients, 1 - self.beta1)
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - self.beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, corrections(self.beta2, steps, root=True))
        torch._foreach_add_(roots, self.epsilon)
        torch._foreach_mul_(roots, corrections(self.beta1, steps))
        return list(torch._foreach_div(means, roots))

    def seeds(self, gradients: torch.Tensor, squares: torch.Tensor, steps: int) -> Mapping[str, torch.Tensor]:
        return {"exp_avg": (1 - self.beta1**steps) * gradients, "exp_avg_sq": (1 - self.beta2**steps) * squares}

    def step_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 0 if self.state == "fp32" else super().step_bytes(shapes)

    def build(self, parameters: Mapping[str, torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        if self.state != "fp32":
            return super().build(parameters, learning_rate)
        groups = [{"params": list(some.values()), "weight_decay": decay} for some, decay in self._groups(parameters)]
        return _Fused(self, groups, lr=learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon, fused=True)
