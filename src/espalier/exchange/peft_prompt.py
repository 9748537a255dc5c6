"""PEFT's prefix tuning, prompt tuning and P-tuning as branches, and back.

PEFT keeps all three as one matrix ``prompt_embeddings``, with a row for each virtual token: for a prefix the keys and the
values of every layer side by side, else the vector itself (P-tuning's encoder is not in the file). It moves positions
behind a prefix, so an imported one has ``shift``, and only one that has it can be exported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from espalier.anatomy.site import Site
from espalier.checkpoint.atomic import atomic_file, write_text
from espalier.checkpoint.directory import read_json
from espalier.checkpoint.peft_adapter import CONFIG, TENSORS
from espalier.checkpoint.safetensors_file import SafetensorsFile, torch_dtype, write_safetensors
from espalier.delta.store import Delta
from espalier.errors import EspalierError

KINDS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""PEFT's names of what is imported here."""
_NAME = "prompt_embeddings"


def import_prompt(folder: Path, sites: Sequence[Site]) -> Delta:
    """A PEFT adapter of one of ``KINDS`` as a delta of a model with these sites.

    Raises:
        EspalierError: when the tensor is missing, is not finite or does not fit the model.
    """
    config, path = read_json(folder / CONFIG), folder / TENSORS
    kind, count = config["peft_type"], config.get("num_virtual_tokens")
    if not path.is_file():
        raise EspalierError(f"{folder} has no {TENSORS}")
    heads = [site for site in sites if site.kind == "heads"]
    (embedding,) = (site for site in sites if site.kind == "embedding")
    width = sum(2 * s.key_value_heads * s.head_dim for s in heads) if kind == "PREFIX_TUNING" else embedding.width
    with SafetensorsFile(path) as file:
        info = file.tensors.get(_NAME)
        if info is None or set(file.tensors) != {_NAME} or info.shape != (count, width) or not torch_dtype(info.dtype).is_floating_point:
            found = f"{info.dtype} of shape {info.shape}" if info else "missing"
            raise EspalierError(f"{path}: {_NAME} is {found}; {kind} of {count} tokens on this model has it alone, of shape ({count}, {width})")
        tensor = file.read(_NAME).float()
    if not bool(tensor.isfinite().all()):
        raise EspalierError(f"{path}: {_NAME} is not finite everywhere")
    if kind == "PREFIX_TUNING":
        parts = iter(tensor.split([s.key_value_heads * s.head_dim for s in heads for _ in "kv"], 1))
        branches = {s.name: {key: next(parts).unflatten(1, (-1, s.head_dim)).contiguous() for key in ("key", "value")} for s in heads}
        return Delta({}, {}, {"method": "prefix", "hyperparameters": {"length": count, "shift": True}}, branches=branches)
    return Delta({}, {}, {"method": "prompt", "hyperparameters": {"prompt_length": count}}, branches={embedding.name: {"P": tensor}})


def export(folder: Path, delta: Delta, sites: Sequence[Site], base: str) -> str | None:
    """Write PEFT's files beside a delta's where it is a prefix or a prompt; returns why not otherwise."""
    method, options = delta.manifest["method"], delta.manifest["hyperparameters"]
    heads = [site for site in sites if site.kind == "heads"]
    if method not in ("prefix", "prompt") or delta.updates:
        return f"it has no such branches as those of {method}"
    if method == "prefix":
        if not options["shift"]:
            return "PEFT moves positions behind a prefix, and this one was trained without shift"
        if [s.name for s in heads] != list(delta.branches) or len({(s.key_value_heads, s.head_dim) for s in heads}) > 1:
            return "only some blocks have a prefix, or their heads differ"
        tensor = torch.cat([t.flatten(1) for own in delta.branches.values() for t in (own["key"], own["value"])], 1)
    else:
        (own,) = delta.branches.values()
        tensor = own["P"]
    first = heads[0]
    config = {
        "peft_type": "PREFIX_TUNING" if method == "prefix" else "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": len(tensor),
        "num_transformer_submodules": 1,
        "num_layers": first.layers,
        "num_attention_heads": first.key_value_heads if method == "prefix" else first.heads,
        "token_dim": first.key_value_heads * first.head_dim if method == "prefix" else tensor.shape[1],
    }
    with atomic_file(folder / TENSORS) as temporary:
        write_safetensors(temporary, {_NAME: tensor.contiguous()})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return None
