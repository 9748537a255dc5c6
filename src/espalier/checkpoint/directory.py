"""A Hugging Face model directory: config, side files, and tensors over one or many safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.checkpoint.fingerprint import combine, tensor_hashes
from espalier.checkpoint.safetensors_file import Pages, SafetensorsFile, TensorInfo, unique
from espalier.errors import EspalierError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LINEAGE = "espalier.json"
"""What a model was made of, when Espalier made it."""
TEMPLATES = "additional_chat_templates"
"""The one folder of a model: where transformers 5 keeps the chat templates beside the first."""


_FOREIGN = ("bin", "pt", "pth", "ckpt", "pkl", "pickle", "h5", "msgpack", "onnx", "gguf")
"""Endings of weights that are no safetensors."""
_NOT_BESIDE = (
    re.compile(rf".*\.(safetensors|{'|'.join(_FOREIGN)})", re.IGNORECASE | re.DOTALL),  # weights
    re.compile(rf".*\.index\.json|README\.md|merge\.yaml|{re.escape(LINEAGE)}", re.DOTALL),
    re.compile(r"(optimizer|scheduler|rng_state).*|trainer_state\.json", re.DOTALL),
    re.compile(r"|\..*|.*[/\\\0].*", re.DOTALL),  # no plain file name, or a hidden one
)


def is_side_file(name: str) -> bool:
    """Whether a file of a model's directory, by its relative name, belongs to the model beside the weights.

    All do but weights of any format, their index, the card, the record of what the model was made of, and states of a
    training; in the folder :data:`TEMPLATES` those that end in ``.jinja``.
    """
    file = name.removeprefix(f"{TEMPLATES}/")
    return not any(kind.fullmatch(file) for kind in _NOT_BESIDE) and (file == name or file.endswith(".jinja"))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        EspalierError: when it cannot be read, is not JSON, names something twice, or has text that is not Unicode.
    """
    if path.exists() and not path.is_file():
        raise EspalierError(f"{path} cannot be read: it is no regular file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique)
        if "\\u" in text:  # escapes can spell lone surrogates, which no file name or header can repeat
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except OSError as error:
        raise EspalierError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EspalierError(f"{path} is not JSON: {error}") from error


class ModelDirectory:
    """The tensors of a model on disk, by name, read one at a time.

    Raises:
        EspalierError: when the directory holds no safetensors weights, or its index and files disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise EspalierError(f"{self.path} is not a directory; a model is a directory with config.json and safetensors")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        if not isinstance(self.config, dict):
            raise EspalierError(f"{self.path / 'config.json'} is not a JSON object")
        self._files: dict[str, SafetensorsFile] = {}
        self.file_of: dict[str, str] = self._locate()

    def _locate(self) -> dict[str, str]:
        if (self.path / SINGLE).exists():
            return dict.fromkeys(self.file(SINGLE).tensors, SINGLE)
        if not (self.path / INDEX).exists():
            if pickles := sorted(p.name for p in self.path.glob("*.bin")):
                raise EspalierError(
                    f"{self.path} holds pickled weights ({pickles[0]}), which are never read; convert them once, on a "
                    "machine you trust them on: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
                )
            raise EspalierError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        index = read_json(self.path / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise EspalierError(f"{self.path / INDEX} has no weight_map of names to files")
        for name in set(weight_map.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise EspalierError(f"{self.path / INDEX} names {name!r}; a shard must be a plain *.safetensors file name")
        for name, file in weight_map.items():
            if name not in self.file(file).tensors:
                raise EspalierError(f"{self.path / INDEX} places {name!r} in {file}, which does not hold it")
        return weight_map

    def file(self, name: str) -> SafetensorsFile:
        """One of the directory's safetensors files, opened once."""
        if name not in self._files:
            self._files[name] = SafetensorsFile(self.path / name)
        return self._files[name]

    def files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted(set(self.file_of.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __contains__(self, name: object) -> bool:
        return name in self.file_of

    def info(self, name: str) -> TensorInfo:
        """The entry of a tensor: dtype, shape, place.

        Raises:
            EspalierError: when the model has no such tensor.
        """
        if name not in self.file_of:
            raise EspalierError(f"{self.path} has no tensor {name!r}")
        return self.file(self.file_of[name]).info(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in fresh memory."""
        self.info(name)
        return self.file(self.file_of[name]).read(name)

    def pages(self, name: str) -> Pages | None:
        """Views of a tensor's bytes: see :class:`Pages`; ``None`` where it is not in one piece."""
        self.info(name)
        return self.file(self.file_of[name]).pages(name)

    def read_into(self, buffer: memoryview, name: str, offset: int) -> None:
        """Bytes of a tensor from ``offset`` on, as many as ``buffer`` holds."""
        self.file(self.file_of[name]).read_into(buffer, name, offset)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self)

    def fingerprint(self) -> str:
        """The model's content hash: see ``fingerprint.py``."""
        hashes: dict[str, str] = {}
        for file in self.files():
            hashes.update(tensor_hashes(self.file(file)))
        return combine({name: self.info(name) for name in self}, hashes)

    def side_files(self) -> dict[str, Path]:
        """Every regular file beside the weights that belongs to the model, by name: see :func:`is_side_file`."""
        found = {p.relative_to(self.path).as_posix(): p for p in sorted([*self.path.iterdir(), *(self.path / TEMPLATES).glob("*")])}
        return {name: p for name, p in found.items() if is_side_file(name) and p.is_file()}


def resolve_model(model: str | Path) -> Path:
    """The directory of a model: a path, ``seedling`` (the embedded one), or a hub id.

    Raises:
        EspalierError: when it is neither on disk nor can be had from the hub.
    """
    if str(model) == "seedling":
        return Path(__file__).resolve().parents[1] / "bundled" / "seedling"
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise EspalierError(f"{path} is a file; a model is a directory with config.json and *.safetensors")
    text = str(model)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or not text.replace("/", "").strip():
        raise EspalierError(f"{path} does not exist; --model takes a directory, 'seedling' or a hub id such as org/name")
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, ignore_patterns=[f"*.{ending}" for ending in _FOREIGN]))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError) as error:
        raise EspalierError(
            f"{hub_id!r} is no directory here and could not be had from the hub ({type(error).__name__}); "
            "check the name and the network (and `hf auth login` for gated models), or download it where there is "
            f"one with `hf download {hub_id} --local-dir DIR` and pass --model DIR"
        ) from error
