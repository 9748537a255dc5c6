"""The course of a run over several methods at once: a composition's own are driven as they are when they stand alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import nn

from espalier.anatomy.site import Site
from espalier.attach.attachment import attach, attachments, trainable_parameters
from espalier.attach.branch import Branch, Composed
from espalier.attach.course import Course
from espalier.attach.method import Moment, Tensors
from espalier.errors import EspalierError


class Shift(Branch):
    """``h <- h + v``, with all that a method may do in a run; it writes down what it was called for."""

    form, place, composition, targets = "v", "sublayer", "h + change", "attention,mlp"

    def __init__(self, kind: str, shared: str = "") -> None:
        self.name, self.kind, self.shared = f"shift {kind}", kind, shared  # type: ignore[misc]
        self.calls: list[tuple[str, list[str]]] = []

    def _note(self, what: str, parts: Sequence[Any]) -> None:
        self.calls.append((what, [part.site.name for part in parts]))

    def accepts(self, site: Site) -> bool:
        return site.kind == self.kind

    def start(self, site: Site, model: nn.Module, stream: Any) -> Tensors:
        return {"v": nn.Parameter(torch.zeros(site.width)), "seen": torch.zeros(1)}

    def start_shared(self, sites: Sequence[Site], stream: Any) -> Tensors:
        return {self.shared: nn.Parameter(torch.ones(len(sites)))} if self.shared else {}

    def prepare(self, pool: Any, sites: Sequence[Site]) -> Mapping[str, Any]:
        (tensor,) = (getattr(pool, name) for name in pool.names)
        return dict(zip((site.name for site in sites), tensor.unbind(), strict=True))

    def branch(self, part: Any, x: torch.Tensor) -> torch.Tensor:
        return part.v.expand_as(x) * (part.context if self.shared else 1.0)

    kept = ("seen",)

    def optimizer_options(self) -> Mapping[str, Mapping[str, float]]:
        return {"v": {"rate": 0.5}} if self.kind == "mlp" else {self.shared: {"rate": 3.0}}

    def check_run(self, parts: Sequence[Any], steps: int) -> None:
        self._note("check_run", parts)

    def penalty(self, parts: Sequence[Any]) -> torch.Tensor:
        self._note("penalty", parts)
        return sum(part.v.sum() for part in parts) + torch.tensor(1.0)

    def frozen(self, part: Any, moment: Moment) -> Mapping[str, bool]:
        return {"v": self.kind == "mlp" and moment.step == 0}

    def before_step(self, parts: Sequence[Any], moment: Moment) -> str:
        self._note("before_step", parts)
        return self.kind

    def after_step(self, parts: Sequence[Any], moment: Moment, before: Any) -> None:
        assert before == self.kind
        self._note("after_step", parts)

    def finish(self, parts: Sequence[Any]) -> None:
        raise EspalierError(f"{self.kind} did not reach its budget")

    def count(self, site: Site) -> int:
        return site.width


class Both(Composed):
    """Shifts behind attention and behind the feed-forward."""

    name, targets = "both", "attention,mlp"

    def __init__(self, *shared: str) -> None:
        self.names = shared or ("a", "b")

    def methods(self) -> Sequence[Branch]:
        return [Shift(kind, name) for kind, name in zip(("attention", "mlp"), self.names, strict=True)]


def test_each_method_of_a_composition_is_driven_for_its_own_parts() -> None:
    """All that a method may do in a run: none of it is asked of the composition, which knows nothing of it."""
    method = Both()
    model = attach(tiny("llama"), method)
    course = Course(model, 2)
    course.check()
    assert len(course.kept()) == 4
    v = {name: p for name, p in trainable_parameters(model).items() if name.endswith(".v")}
    for step in range(2):
        course.begin(step)
        assert [p.requires_grad for name, p in v.items() if "mlp" in name] == [step == 1] * 2
        assert float(course.penalty().detach()) == 2.0
        (model(tokens(), labels=tokens()).loss + course.penalty()).backward()
        course.before_step()
        course.after_step()
    with pytest.raises(EspalierError, match="attention did not reach its budget"):
        course.finish()
    for part in method.made:
        assert isinstance(part, Shift)
        sites = [f"blocks.{i}.{part.kind}" for i in range(2)]
        assert [what for what, _ in part.calls] == ["check_run", *["penalty", "penalty", "before_step", "after_step"] * 2]
        assert all(seen == sites for _, seen in part.calls)


def test_nothing_that_a_branch_may_do_is_lost_in_a_composition() -> None:
    """Every function of the contract is handed on by it, asked of a site's own method, or of itself alone; a new one belongs to one of these."""
    in_a_run = {"check_run", "penalty", "frozen", "before_forward", "before_step", "after_step", "reselect", "finish", "report"}
    at_a_site = {"start", "start_measured", "gain", "tensors", "branch", "machine"}
    its_own = {"check", "stored"}
    contract = {name for name, _ in inspect.getmembers(Branch, inspect.isfunction) if not name.startswith("_")}
    handed_on = {name for name in vars(Composed) if name in contract}
    assert contract == handed_on | in_a_run | at_a_site | its_own and not handed_on & (in_a_run | at_a_site | its_own)


def test_options_of_the_optimizer_are_of_the_method_that_gives_them() -> None:
    model = attach(tiny("llama"), Both())
    found = Course(model, 1).optimizer_options()
    assert {name for name, options in found.items() if options == {"rate": 0.5}} == {n for n in trainable_parameters(model) if "mlp" in n and n.endswith(".v")}
    assert [name for name, options in found.items() if options == {"rate": 3.0}] == ["espalier_pools.both.a"]
    assert len(found) == 3


def test_methods_of_a_composition_see_their_own_shared_tensors_alone() -> None:
    model = attach(tiny("llama"), Both())
    attachment = attachments(model)["both"]
    with torch.no_grad():
        attachment.pool.b.copy_(torch.tensor([2.0, 5.0]))
    attachment.pool.prepare()
    assert {name: float(value.detach()) for name, value in attachment.pool.context.items()} == {
        "blocks.0.attention": 1.0, "blocks.1.attention": 1.0, "blocks.0.mlp": 2.0, "blocks.1.mlp": 5.0
    }  # fmt: skip
    stored = attachment.stored_branches()
    assert set(stored["shared"]) == {"a", "b"} and set(stored["blocks.0.mlp"]) == {"v", "seen"}
    with pytest.raises(EspalierError, match="two of the methods that both is made of share a tensor called 'a'"):
        attach(tiny("llama"), Both("a", "a"))


@pytest.mark.parametrize(("method", "options", "step"), [("lamda", {"rank": 8, "freeze": 0.5}, 3), ("increlora", {}, 0), ("sara", {}, 5)])
def test_what_stands_still_is_no_part_of_the_gradients_norm(method: str, options: dict[str, Any], step: int) -> None:
    """Else clipping would scale what moves down by numbers that do not."""
    model, x = tiny("llama"), tokens()
    attach(model, method, **options)
    course = Course(model, 10)
    for now in range(step + 1):
        course.begin(now)
        model.zero_grad()
        (model(x, labels=x).loss + course.penalty()).backward()
        gradients = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
        before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        course.before_step()
        seen = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
        with torch.no_grad():
            for p in trainable_parameters(model).values():
                p += 1e-3
        course.after_step()
    moved = {name: (trainable_parameters(model)[name] != before[name]) for name in seen}
    assert any(bool((gradients[name][~moved[name]] != 0).any()) for name in seen)
    assert all(bool((seen[name][~moved[name]] == 0).all()) for name in seen)
    assert any(bool((seen[name][moved[name]] != 0).any()) for name in seen)
