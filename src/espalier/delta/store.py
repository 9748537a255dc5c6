"""A delta on disk: ``delta.safetensors`` (plain tensors), ``delta.json`` (what they mean), a model card.

``delta.json`` is written last and holds the SHA-256 of the tensors, so a directory that has it is whole.
Tensors are named ``PARAMETER:FIELD``; factors that several parameters share are stored once, as
``shared:NAME``. Where the delta is plain LoRA the directory also loads in PEFT as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.checkpoint.atomic import atomic_file, write_text
from espalier.checkpoint.directory import read_json
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.delta.forms import Update, form
from espalier.errors import EspalierError

FORMAT = 1
TENSORS, MANIFEST = "delta.safetensors", "delta.json"
_KINDS = {"base": dict, "method": str, "hyperparameters": dict, "settings": dict, "training": dict, "special_tokens": dict}


@dataclass
class Layout:
    """Where an update belongs in the stored model: other names of the parameter, and how its matrix lies."""

    names: tuple[str, ...] = ()
    transposed: bool = False
    gate_up: str = ""

    @classmethod
    def of(cls, target: Target) -> Layout:
        return cls(target.names, target.transposed, target.gate_up)


@dataclass
class Delta:
    """Updates by parameter name, with where each lies, and everything else that ``delta.json`` says."""

    updates: dict[str, Update]
    layouts: dict[str, Layout]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, shared factors once."""
        shared = {u.shared[f]: t for u in self.updates.values() for f, t in u.tensors().items() if f in u.shared}
        return sum(u.nbytes for u in self.updates.values()) + sum(t.numel() * t.element_size() for t in shared.values())

    @property
    def base_fingerprint(self) -> str | None:
        return self.manifest.get("base", {}).get("fingerprint")


def _stored(name: str, key: str, update: Update) -> str:
    """The name in the file of one tensor of a parameter's update."""
    return f"shared:{update.shared[key]}" if key in update.shared else f"{name}:{key}"


def save(folder: Path, delta: Delta, card: str) -> int:
    """Write a delta into a directory (made when missing); returns the bytes of its tensors' file.

    Every file is written atomically, ``delta.json`` last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    described = {}
    for name, update in delta.updates.items():
        for key, tensor in update.tensors().items():
            tensors[_stored(name, key, update)] = tensor.detach()
        layout = delta.layouts[name]
        described[name] = {
            "form": update.form,
            "shape": list(update.shape),
            "gain": float(update.gain),
            "constants": update.constants(),
            "shared": dict(update.shared),
            "names": list(layout.names),
            "transposed": layout.transposed,
            "gate_up": layout.gate_up,
        }
    with atomic_file(folder / TENSORS) as temporary:
        write_safetensors(temporary, tensors, {"espalier_delta": str(FORMAT)})
        digest = file_digest(temporary)
        size = temporary.stat().st_size
        (folder / MANIFEST).unlink(missing_ok=True)  # no delta from here on, until its manifest is written
    write_text(folder / "README.md", card)
    facts = {"espalier_delta": FORMAT, "sha256": digest}
    manifest = {**facts, **delta.manifest, **facts, "parameters": described}  # a delta that was read has older facts
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return size


def is_delta(folder: Path) -> bool:
    """Whether a directory holds a delta."""
    return (folder / MANIFEST).is_file()


def manifest_of(folder: Path) -> dict[str, Any]:
    """The content of ``delta.json``.

    Raises:
        EspalierError: when the directory is no delta, or one of a newer format.
    """
    if not is_delta(folder):
        if (folder / "adapter_config.json").is_file():
            raise EspalierError(f"{folder} is a PEFT adapter; import it first: espalier convert {folder} --out DIR")
        if (folder / "run" / "recipe.yaml").is_file():
            raise EspalierError(f"{folder} holds a run that has not finished (no {MANIFEST}); finish it with --resume")
        raise EspalierError(f"{folder} is no delta: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("parameters"), dict):
        raise EspalierError(f"{folder / MANIFEST} does not describe a delta")
    if manifest.get("espalier_delta") != FORMAT:
        raise EspalierError(f"{folder / MANIFEST} has format {manifest.get('espalier_delta')!r}; this version reads {FORMAT}")
    for key, kind in _KINDS.items():
        if not isinstance(manifest.get(key, kind()), kind):
            raise EspalierError(f"{folder / MANIFEST}: {key} is {manifest[key]!r}; it must be a {kind.__name__}")
    return manifest


def load(folder: Path) -> Delta:
    """Read a delta.

    Raises:
        EspalierError: when anything is missing, damaged or inconsistent, naming file and parameter.
    """
    manifest = manifest_of(folder)
    described = manifest.pop("parameters")
    path = folder / TENSORS
    if not path.is_file():
        raise EspalierError(f"{path} is missing")
    if file_digest(path) != manifest.get("sha256"):
        raise EspalierError(f"{path} is damaged: its SHA-256 is not the one that {MANIFEST} records")
    updates: dict[str, Update] = {}
    layouts: dict[str, Layout] = {}
    with SafetensorsFile(path) as file:
        shared: dict[str, torch.Tensor] = {}
        fields: dict[str, list[str]] = {}
        for stored in file.tensors:
            parameter, _, key = stored.rpartition(":")
            fields.setdefault(parameter, []).append(key)
        for name, entry in described.items():
            try:
                updates[name] = _update(file, name, entry, fields.get(name, []), shared)
                layouts[name] = _layout(entry)
            except EspalierError as error:
                raise EspalierError(f"{folder}: the update of {name!r}: {error}") from error
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise EspalierError(f"{folder / MANIFEST}: the entry of {name!r} is malformed ({error!r})") from error
        if stray := sorted(set(file.tensors) - {_stored(name, key, u) for name, u in updates.items() for key in u.tensors()}):
            raise EspalierError(f"{path} holds {stray[0]!r}, which {MANIFEST} does not describe")
    return Delta(updates, layouts, manifest)


def _update(
    file: SafetensorsFile, name: str, entry: Mapping[str, Any], private: list[str], shared: dict[str, torch.Tensor]
) -> Update:
    tensors = {key: file.read(f"{name}:{key}") for key in private}
    for key, factor in entry["shared"].items():
        if factor not in shared:
            shared[factor] = file.read(f"shared:{factor}")
        tensors[key] = shared[factor]
    shape, gain = entry["shape"], entry["gain"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise EspalierError(f"shape is {shape!r}; it must be a list of sizes")
    if not isinstance(gain, int | float) or not math.isfinite(gain):
        raise EspalierError(f"gain is {gain!r}; it must be a finite number")
    update = form(entry["form"]).from_tensors(tensors, entry["constants"], tuple(shape), float(gain))
    if unknown := sorted(set(tensors) - set(update.tensors())):
        raise EspalierError(f"the form {update.form!r} has no tensor {unknown[0]!r}")
    if entry["shared"]:
        update.shared = dict(entry["shared"])
    return update


def _layout(entry: Mapping[str, Any]) -> Layout:
    names, transposed, gate_up = entry["names"], entry["transposed"], entry["gate_up"]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise EspalierError(f"names is {names!r}; it must be a list of parameter names")
    if not isinstance(transposed, bool) or not isinstance(gate_up, str):
        raise EspalierError(f"transposed is {transposed!r} and gate_up {gate_up!r}; they must be a truth value and a string")
    return Layout(tuple(names), transposed, gate_up)


def check_base(delta: Delta, folder: Path, base: Path, found: str) -> None:
    """Refuse a delta that was made for another base than ``base``, whose fingerprint is ``found``.

    Raises:
        EspalierError: naming both fingerprints.
    """
    wanted = delta.base_fingerprint
    if wanted != found:
        raise EspalierError(
            f"the delta in {folder} was made for the base {delta.manifest.get('base', {}).get('name')!r} with fingerprint "
            f"{wanted}; {base} has {found}. Give the right base, or pass --any-base to use it all the same"
        )
