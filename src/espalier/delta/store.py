"""A delta on disk: ``delta.safetensors`` (plain tensors), ``delta.json`` (what they mean), a model card.

``delta.json`` is written last; it holds the SHA-256 of every tensor and of itself, so a directory that has it is
whole, and what is read is what was written. Tensors are named ``PARAMETER:FIELD``; factors that several parameters
share are stored once, as ``shared:NAME``. A delta between two checkpoints may also remove tensors (``removed``),
set tensors that the base does not have or has in another shape or dtype (``dtype`` of a layout), and bring the
files beside the weights that differ (``files``: name to SHA-256, or null where the base's is dropped; their content
is in ``files/``). Where the delta is plain LoRA the directory also loads in PEFT as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.target import Target
from espalier.checkpoint.atomic import atomic_file, write_text
from espalier.checkpoint.directory import TEMPLATES, is_side_file, read_json
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.relaid import Source
from espalier.checkpoint.safetensors_file import (
    DTYPES,
    SafetensorsFile,
    SafetensorsWriter,
    dtype_name,
    tensor_bytes,
)
from espalier.delta.forms import Replace, Update, form
from espalier.errors import EspalierError

FORMAT = 1
TENSORS, MANIFEST, FILES = "delta.safetensors", "delta.json", "files"
_KINDS = {
    "base": dict, "method": str, "hyperparameters": dict, "settings": dict, "training": dict, "special_tokens": dict,
    "tensors": dict, "branches": dict, "removed": list, "relaid": dict, "files": dict, "lineage": list,
    "classifier": dict, "vocabulary": int, "added_tokens": list, "over": list, "tasks": list,
}  # fmt: skip


@dataclass
class Layout:
    """Where an update belongs in the stored model: other names of the parameter, and how its matrix lies.

    ``dtype`` (a name of safetensors) says that the update sets the tensor as a whole, in that dtype, whatever the
    base holds there, if anything.
    """

    names: tuple[str, ...] = ()
    transposed: bool = False
    gate_up: str = ""
    dtype: str = ""

    @classmethod
    def of(cls, target: Target) -> Layout:
        return cls(target.names, target.transposed, target.gate_up)


@dataclass
class Delta:
    """Updates by parameter name, with where each lies, and everything else that ``delta.json`` says."""

    updates: Mapping[str, Update]
    layouts: dict[str, Layout]
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where it was read from, if it was."""
    branches: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Name of a site to the tensors of the branch there; ``shared`` to those that sites share."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, shared factors once."""
        branches = sum(t.numel() * t.element_size() for tensors in self.branches.values() for t in tensors.values())
        shared = {u.shared[f]: t for u in self.updates.values() for f, t in u.tensors().items() if f in u.shared}
        return branches + sum(u.nbytes for u in self.updates.values()) + sum(t.numel() * t.element_size() for t in shared.values())

    @property
    def base_fingerprint(self) -> str | None:
        return self.manifest.get("base", {}).get("fingerprint")


@dataclass(frozen=True)
class Entry:
    """What ``delta.json`` says of one parameter, and the (dtype, shape) of each tensor of its update."""

    form: str
    shape: tuple[int, ...]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    layout: Layout
    gain: float = 1.0
    constants: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, update: Update, layout: Layout) -> Entry:
        tensors = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in update.tensors().items()}
        return cls(update.form, tuple(update.shape), tensors, layout, float(update.gain), update.constants(), dict(update.shared))

    def stored(self, name: str, key: str) -> str:
        """The name in the file of one tensor of the update of the parameter ``name``."""
        return f"shared:{self.shared[key]}" if key in self.shared else f"{name}:{key}"

    def as_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "shape": list(self.shape),
            "gain": self.gain,
            "constants": dict(self.constants),
            "shared": dict(self.shared),
            "names": list(self.layout.names),
            "transposed": self.layout.transposed,
            "gate_up": self.layout.gate_up,
            "dtype": self.layout.dtype,
        }


Append = Callable[[str, Any], None]


@contextlib.contextmanager
def writing(
    folder: Path, entries: Mapping[str, Entry], manifest: dict[str, Any], card: str,
    branches: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Iterator[Append]:  # fmt: skip
    """Write a delta into a directory (made when missing), whose tensors come in parts.

    Yields ``append(stored name, bytes)``, which puts the next bytes of a tensor behind those before; different tensors
    may be written by different threads. On leaving, every file is written atomically, ``delta.json`` last, with what
    ``manifest`` holds then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = {e.stored(name, key): spec for name, e in entries.items() for key, spec in e.tensors.items()}
    described = {site: {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in own.items()} for site, own in (branches or {}).items()}
    layout |= {_branch(site, key): spec for site, own in described.items() for key, spec in own.items()}
    hashes = {stored: hashlib.sha256() for stored in layout}
    written = dict.fromkeys(layout, 0)
    with atomic_file(folder / TENSORS) as temporary:
        writer = SafetensorsWriter(temporary, layout, {"espalier_delta": str(FORMAT)})

        def append(stored: str, content: Any) -> None:
            hashes[stored].update(content)
            writer.write_bytes(stored, content, written[stored])
            written[stored] += memoryview(content).nbytes

        try:
            yield append
        finally:
            writer.close()
        writer.require_complete()
        (folder / MANIFEST).unlink(missing_ok=True)  # no delta from here on, until its manifest is written
    write_text(folder / "README.md", card)
    facts = {
        "espalier_delta": FORMAT,
        **{key: value for key, value in manifest.items() if key not in ("espalier_delta", "sha256")},
        "tensors": {stored: h.hexdigest() for stored, h in hashes.items()},
        "parameters": {name: entry.as_json() for name, entry in entries.items()},
        **({"branches": described} if described else {}),
    }
    write_text(folder / MANIFEST, json.dumps({**facts, "sha256": _digest(facts)}, indent=1) + "\n")


def save(folder: Path, delta: Delta, card: str) -> int:
    """Write a delta that is in memory into a directory; returns the bytes of its tensors' file."""
    entries = {name: Entry.of(update, delta.layouts[name]) for name, update in delta.updates.items()}
    with writing(folder, entries, delta.manifest, card, delta.branches) as append:
        for site, tensors in delta.branches.items():
            for key, tensor in tensors.items():
                append(_branch(site, key), tensor_bytes(tensor))
        done: set[str] = set()
        for name, update in delta.updates.items():
            for key, tensor in update.tensors().items():
                if (stored := entries[name].stored(name, key)) not in done:
                    append(stored, tensor_bytes(tensor))
                    done.add(stored)
    return (folder / TENSORS).stat().st_size


def _branch(site: str, key: str) -> str:
    """The name in the file of one tensor of a branch."""
    return f"branch/{site}:{key}"


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content of ``delta.json``, but for the digest itself."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
    if manifest.get("sha256") != _digest(manifest):
        raise EspalierError(f"{folder / MANIFEST} is damaged: its SHA-256 is not the one that it records")
    _check_files(folder / MANIFEST, manifest)
    if not all(isinstance(task, str) for task in manifest.get("tasks", [])):
        raise EspalierError(f"{folder / MANIFEST}: tasks is {manifest['tasks']!r}; it must be a list of names")
    for one in manifest.get("over", []):
        if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("delta", "sha256")):
            raise EspalierError(f"{folder / MANIFEST}: over names {one!r}; it must say `delta` and `sha256`")
    return manifest


def _check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    if not all(isinstance(name, str) for name in manifest.get("removed", [])):
        raise EspalierError(f"{path}: removed is {manifest['removed']!r}; it must be a list of tensor names")
    for name, digest in manifest.get("files", {}).items():
        if not is_side_file(name):
            raise EspalierError(
                f"{path}: files names {name!r}; it must be a plain relative file name, or a template in {TEMPLATES}, and no weights, "
                "index, card, record or state of a training"
            )
        if not isinstance(digest, str) and (digest is not None or name == "config.json"):
            raise EspalierError(f"{path}: the SHA-256 of the file {name!r} is {digest!r}")
    for name, entry in manifest.get("relaid", {}).items():
        try:
            Source.from_json(entry)
        except EspalierError as error:
            raise EspalierError(f"{path}: relaid names {name!r}: {error}") from error


def relaid(manifest: Mapping[str, Any]) -> dict[str, Source]:
    """The tensors that a delta has of its base in another layout, and what each is made of."""
    return {name: Source.from_json(entry) for name, entry in manifest.get("relaid", {}).items()}


def load(folder: Path, *, mapped: bool = False, branches: bool = False, bank: bool = False) -> Delta:
    """Read a delta.

    Args:
        branches: whether the caller knows what to do with a delta's branches; one that works on weights does not.
        bank: whether the caller knows what to do with a delta that has an update of a parameter for each of several tasks.
        mapped: leave the tensors in the file's pages and make each update when it is asked for, so that a delta may be
            larger than memory.

    Raises:
        EspalierError: when anything is missing, damaged or inconsistent, naming file and parameter.
    """
    manifest = manifest_of(folder)
    described, hashes = manifest.pop("parameters"), manifest.pop("tensors", {})
    branched = manifest.pop("branches", {})
    if branched and not branches:
        raise EspalierError(
            f"{folder} holds branches of {manifest.get('method')} (at {', '.join([*branched][:3])}{', ...' if len(branched) > 3 else ''}): "
            "they are modules beside the weights and cannot be merged into them; eval, generate and espalier.load use such a delta as it is"
        )
    if len(tasks := manifest.get("tasks", [])) > 1 and not bank:
        raise EspalierError(
            f"{folder} is a bank of {len(tasks)} tasks ({', '.join(tasks[:5])}{', ...' if len(tasks) > 5 else ''}), each with an update of its "
            f"own; take the one of a task first: espalier convert {folder} --task {shlex.quote(tasks[0])} --out DIR"
        )
    path = folder / TENSORS
    if not path.is_file():
        raise EspalierError(f"{path} is missing")
    updates = _Updates(folder, described, hashes, mapped)
    made: dict[str, Update] = {}
    for name in updates:  # each is made once at least, so that all are checked
        update = updates[name]
        if not mapped:
            made[name] = update
    layouts = {name: updates.layout(name) for name in updates}
    read = {site: updates.branch(site, own) for site, own in branched.items()}
    updates.refuse_strays()
    return Delta(updates if mapped else made, layouts, manifest, folder, read)


class _Updates(Mapping[str, Update]):
    """The updates of a delta's directory, each made from the file when it is asked for."""

    def __init__(self, folder: Path, described: Mapping[str, Any], hashes: Mapping[str, Any], mapped: bool) -> None:
        self.folder, self.described, self.mapped = folder, described, mapped
        self.file = SafetensorsFile(folder / TENSORS)
        self.fields: dict[str, list[str]] = {}
        for stored in self.file.tensors:
            parameter, _, key = stored.rpartition(":")
            self.fields.setdefault(parameter, []).append(key)
        self.hashes, self.checked = hashes, set[str]()
        self.shared: dict[str, torch.Tensor] = {}
        self.named: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def __getitem__(self, name: str) -> Update:
        entry = self.described[name]
        try:
            if name == "__metadata__":
                raise EspalierError("no tensor can have this name, which is that of a header's own entry")
            return self._make(name, entry)
        except EspalierError as error:
            raise EspalierError(f"{self.folder}: the update of {name!r}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise EspalierError(f"{self.folder / MANIFEST}: the entry of {name!r} is malformed ({error!r})") from error

    def layout(self, name: str) -> Layout:
        try:
            return _layout(self.described[name])
        except EspalierError as error:
            raise EspalierError(f"{self.folder}: the update of {name!r}: {error}") from error
        except (KeyError, TypeError) as error:
            raise EspalierError(f"{self.folder / MANIFEST}: the entry of {name!r} is malformed ({error!r})") from error

    def branch(self, site: str, described: Any) -> dict[str, torch.Tensor]:
        """The tensors of the branch at a site, as ``delta.json`` describes them."""
        if not isinstance(described, dict):
            raise EspalierError(f"{self.folder / MANIFEST}: the branch at {site!r} is {described!r}; it must be a table of tensors")
        for key, spec in described.items():
            info = self.file.tensors.get(_branch(site, key))
            found = None if info is None else [info.dtype, list(info.shape)]
            if found != spec:
                raise EspalierError(f"{self.file.path}: the tensor {key!r} of the branch at {site!r} is {found or 'missing'}; {MANIFEST} describes {spec}")
        return {key: self._tensor(_branch(site, key)) for key in described}

    def refuse_strays(self) -> None:
        """Refuse tensors that belong to no update; to be asked when every update has been made."""
        if stray := sorted(set(self.file.tensors) - self.named):
            raise EspalierError(f"{self.file.path} holds {stray[0]!r}, which {MANIFEST} does not describe")

    def _tensor(self, stored: str) -> torch.Tensor:
        tensor = self.file.map(stored) if self.mapped else self.file.read(stored)
        if stored not in self.checked:
            if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != self.hashes.get(stored):
                raise EspalierError(f"{self.file.path} is damaged: the SHA-256 of {stored!r} is not the one that {MANIFEST} records")
            self.checked.add(stored)
        self.named.add(stored)
        return tensor

    def _make(self, name: str, entry: Mapping[str, Any]) -> Update:
        tensors = {key: self._tensor(f"{name}:{key}") for key in self.fields.get(name, [])}
        for key, factor in entry["shared"].items():
            if factor not in self.shared:
                self.shared[factor] = self._tensor(f"shared:{factor}")
            tensors[key] = self.shared[factor]
        shape, gain = entry["shape"], entry["gain"]
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
            raise EspalierError(f"shape is {shape!r}; it must be a list of sizes")
        if not isinstance(gain, int | float) or not math.isfinite(gain):
            raise EspalierError(f"gain is {gain!r}; it must be a finite number")
        if entry["transposed"] and len(shape) < 2:
            raise EspalierError(f"transposed is true for the shape {shape}; only matrices are")
        update = form(entry["form"]).from_tensors(tensors, entry["constants"], tuple(shape), float(gain))
        if dtype := entry.get("dtype"):
            sets = isinstance(update, Replace) and update.ignores_base and gain == 1.0 and not entry["transposed"]
            if not sets or dtype_name(update.dtype) != dtype:
                raise EspalierError(f"dtype is {dtype!r}; only an update that replaces all values by ones of that dtype, with a gain of 1, may have it")
        if unknown := sorted(set(tensors) - set(update.tensors())):
            raise EspalierError(f"the form {update.form!r} has no tensor {unknown[0]!r}")
        if entry["shared"]:
            update.shared = dict(entry["shared"])
        return update


def _layout(entry: Mapping[str, Any]) -> Layout:
    names, transposed, gate_up, dtype = entry["names"], entry["transposed"], entry["gate_up"], entry.get("dtype", "")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise EspalierError(f"names is {names!r}; it must be a list of parameter names")
    if not isinstance(transposed, bool) or not isinstance(gate_up, str):
        raise EspalierError(f"transposed is {transposed!r} and gate_up {gate_up!r}; they must be a truth value and a string")
    if dtype and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise EspalierError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or empty")
    return Layout(tuple(names), transposed, gate_up, dtype)


def manifest_after(
    parents: Sequence[Delta], method: str, hyperparameters: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What ``delta.json`` says of a delta that was made of others of the same base.

    The base carries over, and whatever else the parents say alike (tokenizer, chat template, ...). ``lineage`` lists the
    ancestors, the oldest first.

    Args:
        settings: instead of those of the parents.

    Raises:
        EspalierError: when the parents stand on different deltas.
    """
    first, *others = (parent.manifest for parent in parents)
    for parent in parents:
        if parent.manifest.get("over", []) != first.get("over", []):
            raise EspalierError(f"the deltas in {parents[0].folder} and {parent.folder} stand on different deltas, so they cannot become one")
    alike = {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}
    alike |= {key: first[key] for key in ("base",) if key in first}
    lineage: list[dict[str, Any]] = []
    for parent in parents:
        facts = {key: parent.manifest.get(key) for key in ("method", "hyperparameters", "settings", "sha256")}
        lineage += [*parent.manifest.get("lineage", []), {"delta": str(parent.folder or "(never written)"), **facts}]
    made = {
        **{key: value for key, value in alike.items() if key not in ("tensors", "parameters", "sha256")},
        "method": method,
        "hyperparameters": dict(hyperparameters),
        "lineage": lineage,
    }
    return made if settings is None else {**made, "settings": dict(settings)}


def brought_files(delta: Delta, folder: Path) -> dict[str, Path | None]:
    """The files beside the weights that a delta in ``folder`` brings, by name; ``None`` for those that it drops.

    Raises:
        EspalierError: when one lies elsewhere, is missing, or is not the one that the delta recorded.
    """
    found: dict[str, Path | None] = {}
    for name, digest in delta.manifest.get("files", {}).items():
        content = found[name] = None if digest is None else folder / FILES / name
        if content is None:
            continue
        if not content.resolve().is_relative_to(folder.resolve() / FILES):
            raise EspalierError(f"{content} is a link to a file elsewhere: it leads to {content.resolve()}, out of {folder / FILES}")
        if not content.is_file() or file_digest(content) != digest:
            raise EspalierError(f"{content} is missing or damaged: its SHA-256 is not the one that {MANIFEST} records")
    return found


def check_chain(delta: Delta, folder: Path, below: Sequence[str] = (), otherwise: str = "; here a delta must stand on the base alone") -> None:
    """Refuse a delta that was trained over others which are not below it in their order.

    Args:
        below: SHA-256 of the ``delta.json`` of each that is below it, innermost first.
        otherwise: what the user may do.

    Raises:
        EspalierError: naming what it stands on.
    """
    over, rest = delta.manifest.get("over", []), iter(below)
    if not all(one["sha256"] in rest for one in over):
        chain = ", then ".join(f"{one['delta']} (sha256 {one['sha256'][:12]})" for one in over)
        raise EspalierError(f"the delta in {folder} was trained over {chain}, which it must stand on{otherwise}")


FIRST = ": give what it stands on first, with --delta, or pass --any-base"
ANY_BASE = ", or pass --any-base to use it all the same"


def check_base(delta: Delta, folder: Path, base: Path, found: str, otherwise: str = "") -> None:
    """Refuse a delta that was made for another base than ``base``, whose fingerprint is ``found``.

    Args:
        otherwise: what the user may do instead of giving the right base.

    Raises:
        EspalierError: naming both fingerprints.
    """
    wanted = delta.base_fingerprint
    if wanted != found:
        raise EspalierError(
            f"the delta in {folder} was made for the base {delta.manifest.get('base', {}).get('name')!r} with fingerprint "
            f"{wanted}; {base} has {found}. Give the right base{otherwise}"
        )
