"""Loading a model from disk, and a model with deltas on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from espalier import registry
from espalier.attach.attachment import attach_updates, attachments
from espalier.attach.device import pick_device
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.delta import store
from espalier.errors import EspalierError

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


def load_model(model: str | Path, dtype: str | torch.dtype | None = None, device: str | None = None) -> PreTrainedModel:
    """A causal language model from a directory, ``seedling`` or a hub id, in evaluation mode.

    Raises:
        EspalierError: when there is no such model, or transformers cannot make one of it.
    """
    import transformers

    path = resolve_model(model)
    directory = ModelDirectory(path)
    wanted = torch_dtype(dtype, directory)
    transformers.utils.logging.disable_progress_bar()
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    try:
        loaded, facts = load(path, dtype=wanted, local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except (*MALFORMED, RuntimeError) as error:
        raise EspalierError(f"transformers cannot load {path}: {_one_line(error)}") from error
    if missing := sorted(facts["missing_keys"]):  # transformers would train or sample with random numbers in their place
        raise EspalierError(f"{path} lacks {missing[0]!r} ({len(missing)} tensors in all), which {type(loaded).__name__} needs")
    return nn.Module.to(loaded, pick_device(device)).eval()


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


def empty_model(path: Path) -> PreTrainedModel:
    """The model of a directory without its numbers (on the meta device): for names and shapes.

    Raises:
        EspalierError: when transformers cannot make one of it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except MALFORMED as error:
        raise EspalierError(f"transformers cannot make a causal language model of {path}: {_one_line(error)}") from error


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        EspalierError: when the directory has none.
    """
    import transformers

    path = resolve_model(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MALFORMED as error:
        raise EspalierError(f"no tokenizer could be loaded from {path}: {_one_line(error)}") from error
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def put_on(model: PreTrainedModel, folder: Path, directory: ModelDirectory, *, any_base: bool = False, scale: float = 1.0) -> store.Delta:
    """Put a stored delta on a live model, above those that it carries; returns the delta.

    Raises:
        EspalierError: when the delta is damaged, does not fit, or is for another base (unless ``any_base``).
    """
    delta = store.load(folder, branches=True)
    if not any_base:
        store.check_base(delta, folder, directory.path, directory.fingerprint(), store.ANY_BASE)
    name = f"delta{len(attachments(model))}"
    made_by = delta.manifest.get("method", "stored")
    method = registry.make(made_by, "brancher", **delta.manifest.get("hyperparameters", {})) if delta.branches else None
    attach_updates(model, delta.updates, name, scale, made_by, delta.branches, method)
    return delta


def load(
    model: str | Path,
    deltas: Sequence[str | Path] = (),
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    scale: float = 1.0,
    any_base: bool = False,
) -> PreTrainedModel:
    """A model from disk with deltas on it, in evaluation mode; ``detach`` takes them off again.

    Args:
        model: directory, ``seedling`` or hub id.
        deltas: directories, innermost first.
        dtype: ``bf16`` or ``fp32``; default: as stored.
        scale: multiplies every delta; 0 gives the base.
        any_base: accept deltas that were made for another base.

    Raises:
        EspalierError: when anything is missing, damaged, or does not belong together.
    """
    loaded = load_model(model, dtype, device)
    directory = ModelDirectory(resolve_model(model))
    for folder in deltas:
        put_on(loaded, Path(folder), directory, any_base=any_base, scale=scale)
    return loaded
