"""Saving the delta that a live model carries: for ``tune``, and for one's own training loop."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from espalier import registry
from espalier.anatomy.site import sites
from espalier.attach.attachment import Attachment, attachments
from espalier.attach.branch import Branch
from espalier.checkpoint import peft_adapter
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.data.encode import Encoder
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.exchange import new_head, new_tokens, peft_kinds, peft_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    tokenizer: Any = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a delta that :func:`espalier.attach` put on a model into a directory.

    Under sharding (FSDP2) every process must call it; each tensor is gathered whole, and the process of rank 0 writes.

    Args:
        model: carries the delta.
        out: the directory; made when missing, its delta replaced.
        name: which delta, when the model carries several.
        base: the base's directory or id; default: where the model was loaded from.
        tokenizer: recorded, so that ``eval`` and ``generate`` can check theirs.
        training: facts about the training, recorded as they are.

    Returns:
        ``bytes`` of the tensors' file, and ``peft``: ``None`` when PEFT's files were written too, else why not.

    Raises:
        EspalierError: when the model carries no such delta, or its base cannot be found.
    """
    attachment = _one(model, name)
    source = str(base or getattr(model.config, "_name_or_path", "") or "")
    if not source:
        raise EspalierError("the model does not say where it was loaded from; pass base=DIR so that the delta can name its base")
    directory = ModelDirectory(resolve_model(source))
    facts = {
        "name": source,
        "fingerprint": directory.fingerprint(),
        "model_type": model.config.model_type,
    }
    manifest = describe(attachment, facts, Encoder(tokenizer) if tokenizer is not None else None, "all tokens", training or {})
    return write(model, attachment, manifest, Path(out), directory, tokenizer)


def _one(model: nn.Module, name: str | None) -> Attachment:
    present = attachments(model)
    if name is None and len(present) == 1:
        return next(iter(present.values()))
    if name not in present:
        what = f"no delta called {name!r}" if name else "no single delta: say which with name="
        raise EspalierError(f"the model carries {what} (it carries: {', '.join(present) or 'none'})")
    return present[name]


def describe(
    attachment: Attachment, base: dict[str, Any], encoder: Encoder | None, mask_policy: str, training: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``delta.json`` says beside the parameters."""
    method = attachment.method.stored() if isinstance(attachment.method, Branch) else attachment.method
    return {
        "method": method.name,
        "hyperparameters": {h.name: getattr(method, h.name) for h in registry.find(method.name, registry.ATTACHED).hyperparameters},
        "settings": attachment.settings,
        "base": base,
        "tokenizer": encoder.fingerprint if encoder else None,
        "chat_template": encoder.template_fingerprint if encoder else None,
        "special_tokens": encoder.special_tokens if encoder else {},
        "mask_policy": mask_policy,
        **({"tasks": names} if (names := list(method.task_names())) else {}),
        "training": dict(training),
    }


def stands_on(model: nn.Module, attachment: Attachment) -> list[dict[str, str]]:
    """The stored deltas that act below one on a live model, innermost first: where each is, and the SHA-256 of its ``delta.json``."""
    present = list(attachments(model).values())
    below = present[: next(number for number, other in enumerate(present) if other is attachment)]
    return [{"delta": other.stored[0], "sha256": other.stored[1]} for other in below if other.stored and other.active]


def write(
    model: PreTrainedModel, attachment: Attachment, manifest: dict[str, Any], out: Path, base: ModelDirectory | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a delta with its card, and PEFT's files where PEFT has its kind.

    Args:
        base: what the model was made of, if it is on disk; a head or tokens that it does not have are brought along.
        tokenizer: the model's, where it has new tokens.

    Raises:
        EspalierError: when the model has a parameter that neither the base nor the delta sets.
    """
    targets = {name: slot.target for name, slot in attachment.slots.items()}
    updates, branches = attachment.updates(), attachment.stored_branches()  # every process gathers
    layouts = {name: store.Layout.of(t) for name, t in targets.items()}
    if over := stands_on(model, attachment):
        manifest = manifest | {"over": over}
    head = new_head.beyond(model, base) if base is not None else None
    if head is not None:
        new_head.as_whole(head, updates, layouts)
    if not _is_writer():
        return {"bytes": 0, "peft": "another process writes"}
    if head is not None and base is not None:
        manifest = manifest | new_head.bring(head, model, base, out)
    if base is not None and (tokens := new_tokens.tokens_of(attachment)):
        new_tokens.as_whole(base, targets, updates, layouts)
        manifest = manifest | new_tokens.bring(tokens, tokenizer, model, base, manifest, out)
    delta = store.Delta(updates, layouts, manifest, branches=branches)
    if store.is_delta(out):
        peft_adapter.remove(out)  # the old delta's files: PEFT may not be able to hold the new one
    size = store.save(out, delta, card(manifest, bool(delta.branches)))
    name = str(manifest["base"]["name"])
    why = peft_prompt.export(out, delta, sites(model), name) if delta.branches else peft_kinds.export(out, delta, targets, name, model)
    return {"bytes": size, "peft": why}


def _is_writer() -> bool:
    import torch.distributed as distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def card(manifest: Mapping[str, Any], branched: bool = False) -> str:
    """The model card of a delta; one with branches cannot be applied."""
    base, training = manifest["base"], manifest["training"]
    options = ", ".join(f"{k} {v}" for k, v in manifest["hyperparameters"].items())
    facts = "".join(f"- {key.replace('_', ' ')}: {value}\n" for key, value in training.items())
    tasks = manifest.get("tasks", [])
    used, take = ("TASK", f"    espalier convert . --task {shlex.quote(tasks[0])} --out TASK\n") if len(tasks) > 1 else (".", "")
    deltas = "".join(f"--delta {one['delta']} " for one in manifest.get("over", [])) + f"--delta {used}"
    return (
        f"---\nlibrary_name: espalier\nbase_model: {base['name']}\ntags: [espalier, {manifest['method']}]\n---\n\n"
        f"# A delta of {base['name']}\n\n"
        f"Method `{manifest['method']}`{f' ({options})' if options else ''}; loss over {manifest['mask_policy']}; base "
        f"fingerprint `{base['fingerprint']}`.\n\n{facts}\n"
        f"{take}    espalier generate --model {base['name']} {deltas} --prompt TEXT\n"
        + ("" if branched else f"    espalier apply --model {base['name']} {deltas} --out MERGED\n")
    )
