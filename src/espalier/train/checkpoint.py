"""Checkpoints of a run: what it takes to go on to the same bits, and nothing of the frozen base.

``checkpoints/step-00000100/`` holds the trained tensors, the optimizer's state by parameter name, the
random state and ``state.json`` with step, place in the data, versions and a SHA-256 of every file and of itself. It is
written under a temporary name and renamed, so it is whole or absent; the last two are kept, or as many as are asked for.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.checkpoint.atomic import atomic_directory, sweep_temporaries
from espalier.checkpoint.directory import read_json
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors
from espalier.data.batches import Cursor
from espalier.errors import EspalierError

KEPT = 2
_FILES = ("trained.safetensors", "optimizer.safetensors", "random.safetensors")
_NAME = re.compile(r"step-(\d{8})")


@dataclass
class State:
    """Everything of a run beside its tensors."""

    step: int
    cursor: Cursor
    tokens: int
    seconds: float


def environment() -> dict[str, Any]:
    """What a run's bits depend on beside its recipe."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[id(parameter)]}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors


def save(folder: Path, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, state: State, keep: int = KEPT) -> Path:
    """Write the checkpoint of a step (trained tensors, and others that change in the run), then remove all but the last ``keep`` (0: none)."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    target = folder / f"step-{state.step:08d}"
    sweep_temporaries(target)
    with atomic_directory(target) as temporary:
        write_safetensors(temporary / "trained.safetensors", {n: t.detach() for n, t in tensors.items()})
        write_safetensors(temporary / "optimizer.safetensors", _optimizer_tensors(optimizer, names))
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        write_safetensors(temporary / "random.safetensors", random)
        digests = {file.name: file_digest(file) for file in sorted(temporary.iterdir())}
        content = {"format": 1, **asdict(state), "environment": environment(), "files": digests}
        content["sha256"] = _digest(content)
        (temporary / "state.json").write_text(json.dumps(content, indent=1))
    for old in steps(folder)[:-keep] if keep else ():
        shutil.rmtree(old)
    return target


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of everything in ``state.json`` but the hash itself."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


def at_once(run_steps: int, every: int, keep: int) -> int:
    """How many checkpoints a run has at its end: one before its first step, of all ``every`` steps (0: none), and of the last; ``keep`` (0: all) stay."""
    made = -(-run_steps // every) + 1 if every else 1
    return min(keep, made) if keep else made


def sweep(folder: Path) -> None:
    """Remove what killed writers left."""
    if folder.is_dir():
        for leftover in folder.glob(".step-*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def check(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``, after comparing every file with its hash.

    Raises:
        EspalierError: when a file is missing or differs, naming the file and the last good checkpoint.
    """

    try:
        content = read_json(path / "state.json")
        files = content["files"]
        Cursor(**content["cursor"])
        why = next((reason for name in _FILES if (reason := _damage(path / name, files.get(name)))), None)
        if content["sha256"] != _digest(content):
            why = "state.json does not have the SHA-256 that it records"
    except (KeyError, TypeError, AttributeError) as error:
        why = f"state.json lacks {error}"
    except EspalierError as error:
        why = str(error)
    if why is None:
        return content
    others = [p.name for p in steps(path.parent) if p.name < path.name]
    advice = f"remove {path} to resume from {others[-1]}" if others else f"remove {path} and start again"
    raise EspalierError(f"checkpoint {path} is damaged ({why}); {advice}")


def _damage(file: Path, digest: str | None) -> str | None:
    if digest is None:
        return f"state.json does not list {file.name}"
    if not file.exists():
        return f"{file.name} is missing"
    return None if file_digest(file) == digest else f"{file.name} does not have the recorded SHA-256"


def load(
    path: Path, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[State, dict[str, Any]]:
    """Put a checkpoint's tensors and random state in place.

    Returns:
        The run's state, and the differences between its environment and this one: name to (then, now).

    Raises:
        EspalierError: when the checkpoint is damaged or is of another set of parameters.
    """
    content = check(path)
    trained = read_safetensors(path / "trained.safetensors")
    if trained.keys() != tensors.keys():
        odd = sorted(trained.keys() ^ tensors.keys())
        raise EspalierError(f"checkpoint {path} is of another run: its parameters differ, first in {odd[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if trained[name].shape != tensor.shape or trained[name].dtype != tensor.dtype:
                raise EspalierError(
                    f"checkpoint {path} is of another run: {name} is {trained[name].dtype} {tuple(trained[name].shape)} "
                    f"there, {tensor.dtype} {tuple(tensor.shape)} here"
                )
            tensor.copy_(trained[name])
    saved = read_safetensors(path / "optimizer.safetensors")
    optimizer.state.clear()
    for name, value in saved.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = tensors[parameter_name]
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    random = read_safetensors(path / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    then, now = content["environment"], environment()
    differences = {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}
    state = State(content["step"], Cursor(**content["cursor"]), content["tokens"], content["seconds"])
    return state, differences
