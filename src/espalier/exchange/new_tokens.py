"""What a delta brings where its model has more tokens than its base: the tokenizer, and a config with the larger vocabulary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.anatomy.target import Target
from espalier.attach.attachment import Attachment
from espalier.attach.new_tokens import NewRows
from espalier.checkpoint.atomic import write_text
from espalier.checkpoint.directory import ModelDirectory, is_side_file, read_json
from espalier.checkpoint.fingerprint import file_digest
from espalier.checkpoint.safetensors_file import dtype_name
from espalier.delta.forms import Replace, Update
from espalier.delta.store import FILES, Layout
from espalier.errors import EspalierError
from espalier.exchange.new_head import found_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tokens_of(attachment: Attachment) -> list[int]:
    """The tokens that a delta on a live model adds."""
    return next((slot.method.tokens for slot in attachment.slots.values() if isinstance(slot.method, NewRows)), attachment.settings.get("new_tokens", []))


def as_whole(base: ModelDirectory, targets: Mapping[str, Target], updates: Mapping[str, Update], layouts: Mapping[str, Layout]) -> None:
    """Say of updates that set a matrix of more rows than the base's that they set it as a whole."""
    for name, update in updates.items():
        if isinstance(update, Replace) and update.ignores_base and not layouts[name].dtype and not found_in(base, targets[name]):
            layouts[name].dtype = dtype_name(update.dtype)


def bring(tokens: list[int], tokenizer: Any, model: PreTrainedModel, base: ModelDirectory, manifest: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write the tokenizer and the config into a delta's directory; what ``delta.json`` says of them.

    Args:
        manifest: what it says already.

    Raises:
        EspalierError: without a tokenizer.
    """
    if tokenizer is None:
        raise EspalierError("the delta adds tokens; pass the tokenizer that has them: save(..., tokenizer=tokenizer)")
    folder = out / FILES
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(manifest.get("files", {}))
    content = read_json(folder / "config.json") if "config.json" in files else base.config
    write_text(folder / "config.json", json.dumps({**content, "vocab_size": model.config.vocab_size}, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
            name = path.relative_to(temporary).as_posix()
            if is_side_file(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(path.read_bytes())
                files[name] = file_digest(folder / name)
    files["config.json"] = file_digest(folder / "config.json")
    added = [str(token) for token in tokenizer.convert_ids_to_tokens(tokens)]
    return {"vocabulary": model.config.vocab_size, "added_tokens": added, "files": files}
