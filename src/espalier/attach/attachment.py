"""Attaching updates and branches to a model and taking them off again: for ``tune``, and for one's own training loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from espalier import registry
from espalier.anatomy.parameters import parameters, select
from espalier.anatomy.site import Site, select_sites, sites
from espalier.anatomy.target import Target
from espalier.attach.branch import Branch
from espalier.attach.method import Adapter, Method, Tensors
from espalier.attach.new_tokens import NewRows, mean_of_others, places
from espalier.attach.places import PLACES, BranchSlot
from espalier.attach.routes import put_parameter, rebuild, stored_parameter
from espalier.attach.slot import Companion, Pool, Slot, Whole
from espalier.delta.forms import Update
from espalier.delta.gather import by_parameter
from espalier.errors import EspalierError
from espalier.kernels.philox import Numberless, Stream

Statistics = Callable[[str, str], torch.Tensor]
"""From the name or site of a parameter, and that of a statistic, to its value."""


@dataclass
class Attachment:
    """One named delta on a live model: the method that makes it, its slots by parameter name, and its branches by site."""

    name: str
    method: Method
    slots: dict[str, Slot]
    pool: Pool | None
    settings: dict[str, Any] = field(default_factory=dict)
    branches: dict[str, BranchSlot] = field(default_factory=dict)
    """By name of the site."""
    active: bool = True
    """Whether it acts (see :func:`activate`)."""
    task: str | None = None
    """What forward passes are of, for a method that tells tasks apart (see ``attach/tasks.py``)."""
    stored: tuple[str, str] | None = None
    """Where it was read from, and the SHA-256 of its ``delta.json``, if it was."""

    @property
    def parts(self) -> list[Any]:
        """The slots that the method was put on, or its branches: not companions, nor what trains whole beside it."""
        own = [slot for slot in self.slots.values() if slot.method is self.method and not isinstance(slot, Companion)]
        return [*own, *self.branches.values()]

    @property
    def targets(self) -> list[Target]:
        """The parameters that were chosen."""
        return [slot.target for slot in self.parts if isinstance(slot, Slot)]

    def updates(self) -> dict[str, Update]:
        """The update of every parameter in the form in which it is stored, gathered whole where it is sharded."""
        pool = Whole(self.pool) if self.pool is not None else None
        with torch.no_grad():
            return {name: slot.export(pool) for name, slot in self.slots.items()}

    def stored_branches(self) -> dict[str, Tensors]:
        """The tensors of every branch as they are stored, by site; those that sites share under ``shared``."""
        pool = Whole(self.pool) if self.pool is not None else None
        with torch.no_grad():
            found = {name: self.method.export(Whole(slot), pool) for name, slot in self.branches.items() if isinstance(self.method, Branch)}
            shared = self.method.export_shared(pool) if self.branches and isinstance(self.method, Branch) and pool is not None else {}
        return {**found, "shared": shared} if shared else found

    def trainable(self) -> int:
        """How many numbers are trained."""
        modules = [*self.slots.values(), *self.branches.values(), *([self.pool] if self.pool is not None else [])]
        return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """The deltas on a model, by name, innermost first."""
    return model.__dict__.setdefault("_espalier_attachments", {})


def positions_taken(model: nn.Module) -> int:
    """How many positions in front of every sequence the branches on a model take."""
    return sum(a.method.positions() for a in attachments(model).values() if a.branches and isinstance(a.method, Branch))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, of all that require gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local


def stored(model: nn.Module, name: str) -> torch.Tensor:
    """The base parameter of that name, whether or not reading it gives an updated one."""
    return stored_parameter(*_owner(model, name))  # type: ignore[return-value]


def _logical(model: nn.Module, target: Target) -> torch.Tensor:
    """The weight that a new update of ``target`` stands on, in logical orientation."""
    owner, local = _owner(model, target.name)
    weight = stored(model, target.name)
    if local in owner.__dict__.get("_espalier", {}):
        with torch.no_grad():
            weight = owner._updated(local)  # type: ignore[operator]
    return weight.detach().transpose(-1, -2) if target.transposed else weight.detach()


def _refuse_within_rows(model: nn.Module) -> None:
    if "_espalier_rows" in model.__dict__:
        raise EspalierError("the rows of this model have deltas of their own; leave `with rows(...)` before its deltas are changed")


def _hold(owner: nn.Module, key: str, held: nn.Module) -> None:
    if "espalier" not in owner._modules:
        owner.add_module("espalier", nn.ModuleDict())
    holder: nn.ModuleDict = owner._modules["espalier"]  # type: ignore[assignment]
    holder[key] = held


def _let_go(owner: nn.Module, key: str) -> None:
    holder: nn.ModuleDict = owner._modules["espalier"]  # type: ignore[assignment]
    del holder[key]
    if not len(holder):
        del owner._modules["espalier"]


def _install(model: nn.Module, attachment: Attachment) -> None:
    for target_name, slot in attachment.slots.items():
        owner, local = _owner(model, target_name)
        _hold(owner, f"{local}:{attachment.name}", slot)
        for alias, route in zip(slot.target.names, slot.target.routes, strict=True):
            module, alias_local = _owner(model, alias)
            module.__dict__.setdefault("_espalier", {}).setdefault(alias_local, []).append(slot)
            module.__dict__.setdefault("_espalier_routes", {})[alias_local] = route
            rebuild(module)
    for branch in attachment.branches.values():
        _hold(model.get_submodule(branch.site.owner), f"{branch.site.kind}:{attachment.name}", branch)
        branch.install(model)
    for leader in {branch.site.place: branch for branch in reversed(attachment.branches.values())}.values():
        leader.lead(model)
    if attachment.pool is not None:
        if "espalier_pools" not in model._modules:
            model.add_module("espalier_pools", nn.ModuleDict())
        pools: Any = model._modules["espalier_pools"]
        pools[attachment.name] = attachment.pool
    if attachment.pool is not None and "_espalier_hook" not in model.__dict__:
        model.__dict__["_espalier_hook"] = model.register_forward_pre_hook(_prepare)
    attachments(model)[attachment.name] = attachment


def _prepare(model: nn.Module, inputs: Any = None) -> None:
    pools: Any = model._modules.get("espalier_pools", {})
    for name, pool in pools.items():
        attached = attachments(model)[name]
        if not attached.active:
            continue
        if inputs is not None and attached.task is None and len(names := attached.method.task_names()) > 1:
            raise EspalierError(f"the rows of a batch are of one of the tasks {', '.join(names)}; say which with choose_task(model, NAME)")
        pool.prepare()


def attach(
    model: nn.Module,
    method: str | Method = "lora",
    *,
    targets: str | Sequence[str] | None = None,
    full: str | Sequence[str] = (),
    new_tokens: Sequence[int] = (),
    name: str | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    statistics: Statistics | None = None,
    streams: Callable[[int, str], Stream] = Stream,
    **hyperparameters: Any,
) -> nn.Module:
    """Put a method's updates or branches on a transformers model, in place; only their tensors then require gradients.

    Args:
        model: any transformers model.
        method: name of a registered adaptation method, or one made by ``registry.make``.
        targets: roles or name patterns (see ``anatomy.parameters.select``), of sites for a branch (see
            ``anatomy.site.select_sites``); default: the method's own.
        full: roles or name patterns of parameters that train whole beside the method's updates, such as a new head's or the
            norms; the method leaves them alone where ``targets`` names them too. ``rest`` is all that ``targets`` leaves.
        new_tokens: ids of tokens whose rows of the embedding and the head train beside the method's updates, from the mean
            of the other rows on; the model has these rows (see ``attach.new_tokens.grow``).
        name: of the delta on this model; default: the method's name.
        seed: of the starting values.
        dropout: probability of dropping entries of the updates' inputs in training, in [0, 1).
        dtype: of the trained tensors; products follow the dtype of the activations.
        statistics: of the data, for methods that start from them: gives a statistic by (name or site of a parameter, name
            of the statistic), as an open calibration's ``read`` does.
        streams: makes the source of random numbers from (seed, name of the parameter or, for shared tensors, of the method).
            With another than ours only shapes matter, and nothing is surveyed.
        **hyperparameters: the method's.

    Returns:
        The same model.

    Raises:
        EspalierError: for unknown methods, options or targets, or targets that the method cannot update.
    """
    if isinstance(method, str):
        made: Method = registry.make(method, registry.ATTACHED, **hyperparameters)
    elif hyperparameters:
        raise EspalierError(f"options {sorted(hyperparameters)} go into the method's own constructor")
    else:
        made = method
    if not 0 <= dropout < 1:
        raise EspalierError(f"dropout is {dropout}; it must be at least 0 and less than 1")
    patterns, beside = _patterns(targets if targets is not None else made.targets), _patterns(full)
    present = parameters(model)
    whole = _whole(model, made, patterns, beside)
    chosen = targets_of(model, made, patterns, whole)
    chosen = list(made.selected(chosen, seed)) if isinstance(made, Adapter) else chosen
    _freeze(model)
    name = _fresh_name(model, name or made.name)
    with torch.no_grad():
        _prepare(model)  # the weights that this delta stands on may have others on them, whose tensors are shared

    def ready(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        return {
            key: nn.Parameter(t.detach().to(device, dtype)) if isinstance(t, nn.Parameter) else t.to(device)
            for key, t in tensors.items()
        }

    device = next(model.parameters()).device
    shared = made.start_shared(chosen, streams(seed, made.name))
    pool = Pool(made, chosen, ready(shared, device)) if shared else None
    slots: dict[str, Slot] = {}
    branches: dict[str, BranchSlot] = {}
    if isinstance(made, Branch):
        for site in chosen:
            tensors = ready(_start(model, made.at(site), site, streams(seed, site.name), statistics), device)
            branches[site.name] = PLACES[site.place](made.at(site), site, tensors, pool, 1.0, dropout, device)
    else:
        slots = _slots(model, made, chosen, pool, dropout, statistics, functools.partial(streams, seed), ready)
    aliases = {alias: target for target in present for alias in target.names}
    for leader in list(slots.values()):
        for companion in {aliases[n].name: aliases[n] for n in leader.method.companions(leader.target) if n in aliases}.values():
            if companion.name in slots:
                raise EspalierError(f"{made.name} updates {companion.name} with {leader.target.name} and {slots[companion.name].target.name}; target one of them")
            slots[companion.name] = Companion(leader, companion, _logical(model, companion))
    whole_method: Adapter = registry.make("full", "adapter")
    for target in whole:
        if target.name in slots:
            raise EspalierError(f"{made.name} updates {target.name} with its matrix; leave it out of --full")
        weight = _logical(model, target)
        tensors = whole_method.start(target, weight, streams(seed, target.name))
        slots[target.name] = Slot(whole_method, target, ready(tensors, weight.device), None, 0.0, weight)
    for target in places(present, slots, new_tokens) if new_tokens else ():
        weight = _logical(model, target)
        if target.name in slots:  # which trains whole
            index = torch.tensor(new_tokens, device=weight.device)
            slots[target.name].get_parameter("values").data[index] = mean_of_others(weight, index).to(dtype)
            continue
        rows = NewRows(new_tokens)
        slots[target.name] = Slot(rows, target, ready(rows.start(target, weight, streams(seed, target.name)), weight.device), None, 0.0, weight)
    settings = {"targets": patterns, "seed": seed, "dropout": dropout, **({"full": beside} if beside else {})}
    settings |= {"new_tokens": list(new_tokens)} if new_tokens else {}
    attachment = Attachment(name, made, slots, pool, settings, branches)
    if dropout:
        _refuse_dropout(attachment)
    _install(model, attachment)
    model.train(model.training)
    return model


def _slots(
    model: nn.Module, method: Method, chosen: Sequence[Target], pool: Pool | None, dropout: float, statistics: Statistics | None,
    streams: Callable[[str], Stream], ready: Callable[..., Tensors],
) -> dict[str, Slot]:  # fmt: skip
    """The slots of a method's own targets."""
    assert isinstance(method, Adapter)
    findings: Mapping[str, Any] = {}
    if type(streams("")) is Stream:
        findings = method.survey(chosen, functools.partial(_logical, model), _needed(method, statistics))
    slots = {}
    for target in chosen:
        weight = _logical(model, target)
        tensors = method.start_from(findings.get(target.name), target, weight, streams(target.name))
        bases = method.bases(target, streams(target.name))
        slots[target.name] = Slot(method, target, ready(tensors, weight.device), pool, dropout, weight, bases)
    return slots


def _start(model: nn.Module, method: Branch, site: Site, stream: Stream, statistics: Statistics | None) -> Tensors:
    """The tensors with which a branch starts at a site."""
    if type(stream) is not Stream or method.wanted() is None:
        return method.start(site, model, stream)
    given = _needed(method, statistics)
    assert given is not None
    return method.start_measured(site, model, stream, functools.partial(_logical, model), given)


def _needed(method: Method, statistics: Statistics | None) -> Statistics | None:
    """The statistics that were given, if the method wants any.

    Raises:
        EspalierError: when it does, and there are none.
    """
    if statistics is None and (wanted := method.wanted()) is not None:
        raise EspalierError(f"{method.name} starts from statistics of the data ({wanted.statistics}); pass statistics=")
    return statistics


def targets_of(model: nn.Module, method: Method, targets: str | Sequence[str], whole: Collection[Target] = ()) -> list[Any]:
    """The parameters (or, for a branch, sites) of a model that the patterns name; for a method that can be at all of them.

    Args:
        whole: parameters that train whole beside the method, which leaves them alone.

    Raises:
        EspalierError: when a pattern names nothing, or a parameter that the method cannot update.
    """
    patterns = _patterns(targets)
    if isinstance(method, Branch):
        return select_sites([site for site in sites(model) if method.accepts(site)], patterns)
    assert isinstance(method, Adapter)
    chosen = [target for target in select(parameters(model), patterns) if target not in whole]
    if not chosen and method.name != "full":
        beside = ",".join(target.name for target in whole)
        raise EspalierError(f"--full ({beside}) leaves nothing of --targets {','.join(patterns)} to {method.name}; --method full trains them")
    if refused := [t.name for t in chosen if not method.accepts(t)]:
        raise EspalierError(
            f"{method.name} takes {method.takes}; --targets {','.join(patterns)} also names {refused[0]} "
            f"({len(refused)} such of {len(chosen)})"
        )
    return chosen


def _whole(model: nn.Module, method: Method, patterns: Sequence[str], beside: Sequence[str]) -> list[Target]:
    """The parameters that train whole beside a method: those that are named, and all that it leaves where ``rest`` is."""
    present = parameters(model)
    named = [pattern for pattern in beside if pattern != "rest"]
    chosen = {target.name for target in select(present, named, "--full")} if named else set()
    if "rest" in beside:
        taken = [target for target in targets_of(model, method, patterns, []) if target.name not in chosen]
        gone = {name for target in taken for name in (*target.names, *method.companions(target))} if isinstance(method, Adapter) else set()
        chosen |= {target.name for target in present if not gone.intersection(target.names)}
    return [target for target in present if target.name in chosen]


def _freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _patterns(targets: str | Sequence[str]) -> list[str]:
    parts = targets.split(",") if isinstance(targets, str) else list(targets)
    return [part.strip() for part in parts if part.strip()]


def _fresh_name(model: nn.Module, name: str) -> str:
    _refuse_within_rows(model)
    if name in attachments(model):
        raise EspalierError(f"the model already carries a delta called {name!r}; pass another name=, or detach it first")
    if "." in name or ":" in name or not name:
        raise EspalierError(f"a delta cannot be called {name!r}: no dots, no colons, not empty")
    return name


def _refuse_dropout(attachment: Attachment) -> None:
    if branches := attachment.branches.values():
        if other := [branch.site.name for branch in branches if branch.site.place != "sublayer"]:
            raise EspalierError(f"dropout cannot act on the branch at {other[0]}, which has no input; set dropout to 0")
        return
    if attachment.pool is not None:
        attachment.pool.prepare()
    dropping = attachment.parts
    first = dropping[0]  # one method: what holds for one update holds for all
    with torch.no_grad():
        if first.update().depends_on_base:
            raise EspalierError(
                f"dropout {first.dropout} does not go with {attachment.method.name}: its update depends on the base, "
                "so the update's input is the base's; set dropout to 0"
            )
    for slot in dropping:
        if "weight" in slot.target.routes or "lookup" in slot.target.routes:
            raise EspalierError(
                f"dropout {slot.dropout} cannot act on {slot.target.name}, which is no plain product; set dropout to 0"
            )


@torch.no_grad()
def release_base(model: nn.Module) -> None:
    """Free the base values that no forward pass reads because an update replaces them (full tuning).

    Their parameters keep name and shape, on the meta device. For a run whose base is on disk, or is nothing
    but random numbers; :func:`settle` puts values back.
    """
    _prepare(model)
    for attachment in attachments(model).values():
        for slot in attachment.slots.values():
            owner, local = _owner(model, slot.target.name)
            alone = len(owner.__dict__["_espalier"].get(local, ())) == 1  # what stands below it reads the base
            if slot.method.needs_base or not (alone and slot.update().ignores_base and slot.target.names):
                continue
            empty = nn.Parameter(torch.empty_like(stored(model, slot.target.name), device="meta"), requires_grad=False)
            for alias in slot.target.names:
                put_parameter(*_owner(model, alias), empty)


@torch.no_grad()
def settle(model: nn.Module) -> nn.Module:
    """Write every update into the parameters for good and take the updates off: an ordinary model again.

    Raises:
        EspalierError: when the model carries a branch, which is no part of any parameter.
    """
    if branched := [a.name for a in attachments(model).values() if a.branches]:
        raise EspalierError(f"{branched[0]} has branches, which cannot be written into parameters; detach it first")
    targets = {name: slot.target for a in attachments(model).values() for name, slot in a.slots.items()}
    _prepare(model)
    values = {}
    for name in targets:
        owner, local = _owner(model, name)
        values[name] = nn.Parameter(owner._updated(local).contiguous(), requires_grad=False)  # type: ignore[operator]
    detach(model)
    for name, target in targets.items():
        for alias in target.names:
            put_parameter(*_owner(model, alias), values[name])
    return model


def attach_updates(
    model: nn.Module,
    updates: Mapping[str, Update],
    name: str,
    scale: float = 1.0,
    method_name: str = "stored",
    branches: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    method: Branch | None = None,
) -> nn.Module:
    """Put given updates and branches (of a stored delta) on a model, frozen, in place.

    Args:
        updates: parameter name to update; names that the files have are found too (see ``delta/gather.py``).
        scale: multiplies every update and branch; 0 restores the base.
        branches: name of a site to its tensors, as :meth:`Attachment.stored_branches` gives them.
        method: of the branches.

    Raises:
        EspalierError: when the model has no such parameter or site, or one of another shape, or two updates of one differ.
    """
    from espalier.attach.stored import Stored

    targets = {target.name: target for target in parameters(model)} if updates else {}
    attachment = Attachment(_fresh_name(model, name), Stored.of_many(method_name, scale), {}, None)
    for updated, update in by_parameter(updates, targets.values()).items():
        target = targets[updated]
        weight = stored(model, target.name)
        tensors = {key.replace(".", "__"): tensor.to(weight.device) for key, tensor in update.tensors().items()}
        attachment.slots[target.name] = Slot(Stored(update, scale), target, tensors, None, 0.0, weight)
    if branches:
        assert method is not None
        _stored_branches(model, attachment, branches, method, scale)
    _freeze(model)
    _install(model, attachment)
    model.train(model.training)
    return model


def active(model: nn.Module) -> list[str]:
    """The names of the deltas that act on a model, innermost first."""
    return [name for name, attachment in attachments(model).items() if attachment.active]


def _known(model: nn.Module, names: Collection[str]) -> dict[str, Attachment]:
    present = attachments(model)
    if unknown := [name for name in names if name not in present]:
        raise EspalierError(f"the model carries no delta called {unknown[0]!r} (it carries: {', '.join(present) or 'none'})")
    return present


@torch.no_grad()
def scale(model: nn.Module, name: str, factor: float) -> None:
    """Let a delta act with ``factor`` times its strength: 0 is the base, 1 the delta as it is, exactly.

    A factor of updates that is not 1 is a tensor: changing it recompiles nothing. Branches at 0 do not act. It is of the live
    model: saving does not see it.

    Raises:
        EspalierError: when the model carries no such delta, the factor is not finite, or not 0 or 1 for a branch at the embedding.
    """
    attachment = _known(model, [name])[name]
    if not math.isfinite(factor):
        raise EspalierError(f"factor is {factor}; it must be a finite number")
    for branch in attachment.branches.values():
        if branch.site.place == "embedding" and factor not in (0, 1):
            raise EspalierError(f"a branch at the embedding is there or not, and cannot be scaled by {factor}; give 0 or 1")
        branch.strength = float(factor)
        branch.gain.fill_(branch.method.gain(branch.site) * branch.scale * factor)
        branch.active = attachment.active and factor != 0
    for slot in attachment.slots.values():
        if factor == 1:
            slot.strength = None
        elif slot.strength is None:
            slot.strength = torch.tensor(float(factor), device=slot.gain.device)
        else:
            slot.strength.fill_(factor)


def _stored_branches(model: nn.Module, attachment: Attachment, branches: Mapping[str, Mapping[str, torch.Tensor]], method: Branch, scale: float) -> None:
    """The branches of a stored delta; their sizes are compared with those that the method would give them here."""
    known = {site.name: site for site in sites(model) if method.accepts(site)}
    if strange := [name for name in branches if name not in known and name != "shared"]:
        raise EspalierError(f"the delta has a branch at {strange[0]!r}; this model has no such site for {method.name}")
    chosen = [site for site in known.values() if site.name in branches]
    for site in chosen:
        if site.place == "embedding" and scale not in (0.0, 1.0):
            raise EspalierError(f"a branch at the embedding is there or not, and cannot be scaled by {scale}; give 0 or 1")
    with FakeTensorMode(allow_non_fake_inputs=True):  # sizes without memory, whatever the file asks for
        try:
            starts = {site.name: method.at(site).start(site, model, Numberless(0, site.name)) for site in chosen}
            starts["shared"] = method.start_shared(chosen, Numberless(0, method.name))
        except (RuntimeError, OverflowError, ValueError, TypeError) as error:
            raise EspalierError(f"no branch of {method.name} can have the options that the delta records: {error}") from error
    for name, tensors in starts.items():
        wanted = {key: _kind(tensor) for key, tensor in tensors.items()}
        found = {key: _kind(tensor) for key, tensor in branches.get(name, {}).items()}
        if found != wanted:
            raise EspalierError(f"the branch at {name} holds tensors {found}; {method.name} with these options has {wanted} on this model")
    device = next(model.parameters()).device
    shared = branches.get("shared")
    attachment.method = method
    attachment.pool = Pool(method, chosen, {key: t.to(device) for key, t in shared.items()}) if shared else None
    for site in chosen:
        tensors = {key: t.to(device) for key, t in branches[site.name].items()}
        attachment.branches[site.name] = PLACES[site.place](method.at(site), site, tensors, attachment.pool, scale, 0.0, device)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Shape and dtype; of floating-point tensors, the shape alone."""
    return tuple(tensor.shape) if tensor.is_floating_point() else (*tensor.shape, str(tensor.dtype))


def activate(model: nn.Module, names: Collection[str]) -> None:
    """Let only the deltas of these names act on a model; the others stay on it, and cost no time.

    Those that act make a chain, in the order in which they were attached.

    Raises:
        EspalierError: when the model carries no delta of a name.
    """
    _refuse_within_rows(model)
    names = [names] if isinstance(names, str) else names
    present = _known(model, names)
    acting: dict[nn.Module, dict[str, tuple[str, list[Slot]]]] = {}
    for attachment in present.values():
        attachment.active = attachment.name in names
        for branch in attachment.branches.values():
            branch.active = attachment.active and branch.strength != 0
        for slot in attachment.slots.values():
            for alias, route in zip(slot.target.names, slot.target.routes, strict=True):
                module, local = _owner(model, alias)
                _, slots = acting.setdefault(module, {}).setdefault(local, (route, []))
                if attachment.active:
                    slots.append(slot)
    for module, found in acting.items():
        module.__dict__["_espalier"] = {local: slots for local, (_, slots) in found.items()}
        module.__dict__["_espalier_routes"] = {local: route for local, (route, _) in found.items()}
        rebuild(module)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take a delta (by default all of them) off a model; its base tensors were never touched.

    Raises:
        EspalierError: when the model carries no delta of that name.
    """
    present = _known(model, [name] if name is not None else [])
    before = active(model)
    activate(model, present)
    for gone in [name] if name is not None else list(present):
        attachment = present.pop(gone)
        for target_name, slot in attachment.slots.items():
            owner, local = _owner(model, target_name)
            _let_go(owner, f"{local}:{gone}")
            for alias in slot.target.names:
                module, alias_local = _owner(model, alias)
                module.__dict__["_espalier"][alias_local].remove(slot)
                rebuild(module)
        for branch in attachment.branches.values():
            branch.remove(model)
            _let_go(model.get_submodule(branch.site.owner), f"{branch.site.kind}:{gone}")
        if attachment.pool is not None:
            pools: nn.ModuleDict = model._modules["espalier_pools"]  # type: ignore[assignment]
            del pools[gone]
            if not len(pools):
                del model._modules["espalier_pools"]
                model.__dict__.pop("_espalier_hook").remove()
    activate(model, [other for other in before if other in present])
    return model
