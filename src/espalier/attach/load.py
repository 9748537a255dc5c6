"""Loading a model from disk, and a model with deltas on it."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from espalier import registry
from espalier.anatomy.classification import classifies, with_labels
from espalier.attach.attachment import attach_updates, attachments
from espalier.attach.coded_base import quantize_base
from espalier.attach.device import pick_device
from espalier.attach.new_tokens import grow
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.delta import store
from espalier.errors import EspalierError, one_of
from espalier.kernels.philox import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MALFORMED = (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises for a config or tokenizer that is not as it must be."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def torch_dtype(dtype: str | torch.dtype | None, directory: ModelDirectory | None) -> torch.dtype:
    """The dtype to compute in: ``bf16`` or ``fp32``; by default the one that the model is stored in (bf16 without one).

    Raises:
        EspalierError: for another name. A model stored in float16 computes in bf16 by default.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            raise EspalierError(f"--dtype is {dtype!r}; it must be one of: {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if directory is None:
        return torch.bfloat16
    stored = {directory.info(name).dtype for name in directory}
    return torch.float32 if "F32" in stored or "F64" in stored else torch.bfloat16


def load_model(
    model: str | Path, dtype: str | torch.dtype | None = None, device: str | None = None, deltas: Sequence[str | Path] = ()
) -> PreTrainedModel:
    """A model from a directory, ``seedling`` or a hub id, in evaluation mode: a causal language model, or a sequence classifier.

    It is a classifier where its config says so, or a delta brings such a head.

    Args:
        deltas: directories of those that will be put on it.

    Raises:
        EspalierError: when there is no such model, or transformers cannot make one of it.
    """
    path = resolve_model(model)
    head = head_of(path, deltas)
    loaded, missing = load_as(path, head.config if head else load_config(path), dtype, device)
    if missing := sorted(set(missing) - (head.whole if head else set())):  # transformers would train or sample with random numbers in their place
        raise EspalierError(f"{path} lacks {missing[0]!r} ({len(missing)} tensors in all), which {type(loaded).__name__} needs")
    if (more := _with_tokens(deltas)) is not None:
        grow(loaded, _vocabulary(more, loaded.config.vocab_size))
    return loaded


def _with_tokens(folders: Sequence[str | Path]) -> Path | None:
    """The delta that adds tokens, if one does.

    Raises:
        EspalierError: when two add other tokens.
    """
    found = [folder for folder in map(Path, folders) if store.manifest_of(folder).get("vocabulary") is not None]
    said = [store.manifest_of(folder) for folder in found]
    if any(one["vocabulary"] != said[0]["vocabulary"] or one.get("added_tokens") != said[0].get("added_tokens") for one in said):
        raise EspalierError(f"the deltas in {found[0]} and {found[-1]} add different tokens; apply one, and tune the other on what comes of it")
    return found[0] if found else None


def _vocabulary(folder: Path, before: int) -> int:
    """Rows of the vocabulary under a delta that adds tokens to ``before``."""
    manifest = store.manifest_of(folder)
    rows, added = manifest["vocabulary"], manifest.get("added_tokens", [])
    if rows - before > len(added):
        raise EspalierError(f"{folder / store.MANIFEST}: vocabulary is {rows}, the base's {before}; it adds {len(added)} tokens")
    return max(rows, before)


def _auto(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification if classifies(config) else transformers.AutoModelForCausalLM


def load_as(
    path: Path, config: Any, dtype: str | torch.dtype | None = None, device: str | None = None, *, new: Collection[str] = (), seed: int = 0
) -> tuple[PreTrainedModel, list[str]]:
    """The model that a config describes with a directory's tensors, in evaluation mode.

    Args:
        new: parameters that shall begin anew, as those do which the directory lacks or has in another shape.
        seed: of the values with which they begin.

    Returns:
        The model, and the names of its tensors that the directory lacks, or has in another shape.

    Raises:
        EspalierError: when transformers cannot make it.
    """
    import transformers

    wanted = torch_dtype(dtype, ModelDirectory(path))
    transformers.utils.logging.disable_progress_bar()
    new_head = {"ignore_mismatched_sizes": True} if classifies(config) else {}
    load: Any = _auto(config).from_pretrained
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the caller says what is missing
    try:
        loaded, facts = load(path, config=config, dtype=wanted, local_files_only=True, trust_remote_code=False, output_loading_info=True, **new_head)
    except (*MALFORMED, RuntimeError) as error:
        raise EspalierError(f"transformers cannot load {path}: {_one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = [*facts["missing_keys"], *(key if isinstance(key, str) else key[0] for key in facts["mismatched_keys"])]
    _begin(loaded, {*missing, *new}, seed)
    return nn.Module.to(loaded, pick_device(device)).eval(), missing


@torch.no_grad()
def _begin(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Give parameters that the base does not have their starting values, by name and seed alone.

    Matrices are normal with the family's ``initializer_range``, biases zero, anything else one.
    """
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if parameter.ndim > 1:
            parameter.copy_(Stream(seed, f"head {name}").gaussian(*parameter.shape) * deviation)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def load_config(path: Path) -> Any:
    """The config of a model directory.

    Raises:
        EspalierError: when transformers cannot read it.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MALFORMED as error:
        raise EspalierError(f"transformers cannot read the config of {path}: {_one_line(error)}") from error


@dataclass(frozen=True)
class Head:
    """A classification head that a delta brings: the config of the model that has it, and the parameters that it sets as a whole."""

    config: Any
    whole: frozenset[str]


def head_of(base: Path, folders: Sequence[str | Path]) -> Head | None:
    """The head that the last of some deltas brings to a base, if any does.

    Raises:
        EspalierError: when a delta is damaged, or what it says of its head is malformed.
    """
    for folder in reversed([Path(f) for f in folders]):
        manifest = store.manifest_of(folder)
        if not (said := manifest.get("classifier")):
            continue
        config = load_config(base)
        labels, pad_token = said.get("labels"), said.get("pad_token")
        if not isinstance(labels, list) or len({*map(str, labels)}) != len(labels) or not all(isinstance(name, str) for name in labels):
            raise EspalierError(f"{folder / store.MANIFEST}: the labels are {reprlib.repr(labels)}; they must be different names")
        if type(pad_token) is not int or not 0 <= pad_token < config.vocab_size:
            raise EspalierError(f"{folder / store.MANIFEST}: pad_token is {pad_token!r}; it must be the id of a token, below {config.vocab_size}")
        whole = frozenset(name for name, entry in manifest["parameters"].items() if isinstance(entry, dict) and entry.get("dtype"))
        return Head(with_labels(config, labels, pad_token), whole)
    return None


def empty_model(path: Path, deltas: Sequence[str | Path] = ()) -> PreTrainedModel:
    """What :func:`load_model` makes of a directory, without its numbers (on the meta device): for names and shapes.

    Raises:
        EspalierError: when transformers cannot make one of it.
    """
    head = head_of(path, deltas)
    config = head.config if head else load_config(path)
    if (more := _with_tokens(deltas)) is not None:
        config.vocab_size = _vocabulary(more, config.vocab_size)
    return empty_of(config, path)


def empty_of(config: Any, path: Path) -> PreTrainedModel:
    """The model of a config, which was read from ``path``, without its numbers.

    Raises:
        EspalierError: when transformers cannot make one of it.
    """
    try:
        with torch.device("meta"):
            return _auto(config).from_config(config)
    except MALFORMED as error:
        what = "sequence classifier" if classifies(config) else "causal language model"
        raise EspalierError(f"transformers cannot make a {what} of {path}: {_one_line(error)}") from error


def load_tokenizer(model: str | Path, deltas: Sequence[str | Path] = ()) -> Any:
    """The tokenizer of a model directory, or that of a delta which adds tokens.

    Raises:
        EspalierError: when the directory has none, or a delta's is damaged.
    """
    import transformers

    path = resolve_model(model)
    if (more := _with_tokens(deltas)) is not None:
        store.brought_files(store.Delta({}, {}, store.manifest_of(more)), more)  # they are what was recorded
        path = more / store.FILES
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MALFORMED as error:
        raise EspalierError(f"no tokenizer could be loaded from {path}: {_one_line(error)}") from error
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _refuse_scale(delta: store.Delta, folder: Path, scale: float) -> None:
    """Refuse to scale a delta that sets parameters which the base does not have.

    Raises:
        EspalierError: naming the first.
    """
    whole = next((name for name, layout in delta.layouts.items() if layout.dtype), None)
    if whole is not None and scale != 1.0:
        raise EspalierError(f"the delta in {folder} sets {whole!r} as a whole, which cannot be scaled by {scale}; use it with scale 1")


def put_on(model: PreTrainedModel, folder: Path, directory: ModelDirectory, *, any_base: bool = False, scale: float = 1.0) -> store.Delta:
    """Put a stored delta on a live model, above those that it carries; returns the delta.

    Raises:
        EspalierError: when the delta is damaged, does not fit, or (unless ``any_base``) is for another base, or was trained
            over others that do not act on the model.
    """
    delta = store.load(folder, branches=True)
    _refuse_scale(delta, folder, scale)
    present = attachments(model)
    if not any_base:
        store.check_base(delta, folder, directory.path, directory.fingerprint(), store.ANY_BASE)
        store.check_chain(delta, folder, [a.stored[1] for a in present.values() if a.stored and a.active], store.FIRST)
    name = next(name for number in itertools.count(len(present)) if (name := f"delta{number}") not in present)
    made_by = delta.manifest.get("method", "stored")
    method = registry.make(made_by, "brancher", **delta.manifest.get("hyperparameters", {})) if delta.branches else None
    attach_updates(model, delta.updates, name, scale, made_by, delta.branches, method)
    present[name].stored = (str(folder), delta.manifest["sha256"])
    return delta


def load(
    model: str | Path,
    deltas: Sequence[str | Path] = (),
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    scale: float = 1.0,
    any_base: bool = False,
    base_bits: int | None = None,
) -> PreTrainedModel:
    """A model from disk with deltas on it, in evaluation mode; ``detach`` takes them off again.

    Args:
        model: directory, ``seedling`` or hub id.
        deltas: directories, innermost first.
        dtype: ``bf16`` or ``fp32``; default: as stored.
        scale: multiplies every delta; 0 gives the base.
        any_base: accept deltas that were made for another base.
        base_bits: keep the weights of linear layers and fused experts as codes of 8 or 4 bits (``attach/coded_base.py``).

    Raises:
        EspalierError: when anything is missing, damaged, or does not belong together.
    """
    if base_bits is not None:
        one_of("base_bits", base_bits, (4, 8))
    loaded = load_model(model, dtype, device, deltas)
    if base_bits is not None:
        quantize_base(loaded, base_bits)
    directory = ModelDirectory(resolve_model(model))
    for folder in deltas:
        put_on(loaded, Path(folder), directory, any_base=any_base, scale=scale)
    return loaded
