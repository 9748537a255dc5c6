"""The small models of a logit fusion, as ``generate`` and ``eval`` are asked for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from espalier.attach.attachment import activate, attachments
from espalier.attach.load import load_model, load_tokenizer, put_on
from espalier.checkpoint.directory import ModelDirectory, resolve_model
from espalier.data.encode import Encoder
from espalier.display import Display
from espalier.errors import EspalierError
from espalier.evaluate.logit_fusion import Fusion, Voice, require_one_vocabulary
from espalier.train import session


@dataclass(frozen=True)
class Asked:
    """The options of a fusion; false where none is asked for.

    Raises:
        EspalierError: when they do not belong together.
    """

    experts: list[str] | None
    base: str | None
    active: Literal["one", "all"]
    alpha: float | None

    def __post_init__(self) -> None:
        if (self.base is None) != (not self.experts):
            raise EspalierError("--expert and --expert-base belong together: a fusion needs what was tuned, and what it was tuned from")
        if self.alpha is not None and (not self.experts or not math.isfinite(self.alpha)):
            raise EspalierError(f"fusion_alpha is {self.alpha}; it must be a finite number, and is of --expert")

    def __bool__(self) -> bool:
        return bool(self.experts)

    def fusion(self) -> Fusion:
        """How logits are fused."""
        return Fusion(self.alpha, self.active)

    def voices(
        self, tokenizer: Any, kind: str, any_base: bool, device: str | None, dtype: Literal["bf16", "fp32"] | None, display: Display
    ) -> tuple[Voice, list[Voice]]:
        """The small base and its experts; those that are deltas share its live module.

        Args:
            tokenizer: of the large model.
            kind: of the text: see ``data/encode.py``.

        Raises:
            EspalierError: when something cannot be loaded, or has another vocabulary.
        """
        assert self.base is not None and self.experts is not None
        directory = ModelDirectory(resolve_model(self.base))
        small, own = load_model(directory.path, dtype, device), load_tokenizer(self.base)
        require_one_vocabulary(tokenizer, own, self.base)
        found = []
        for path in self.experts:
            if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
                activate(small, [])  # each is an expert of its own
                manifest = put_on(small, Path(path), directory, any_base=any_base).manifest
                session.check_tokenizer(manifest, path, Encoder(own), kind, display)
                found.append(Voice(small, (list(attachments(small))[-1],)))
            else:
                require_one_vocabulary(tokenizer, load_tokenizer(path), path)
                found.append(Voice(load_model(path, dtype, device)))
        return Voice(small), found
