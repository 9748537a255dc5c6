"""Espalier: change large open-weight models within the memory, disk, bandwidth and time you have.

Every change to a model is a delta. The verbs are functions of this package (``espalier.tune(...)``);
``attach``, ``detach``, ``save`` and ``load`` serve one's own training loop. Importing the package loads no
torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "apply": "espalier.verbs.apply",
    "compress": "espalier.verbs.compress",
    "calibrate": "espalier.verbs.calibrate",
    "convert": "espalier.verbs.convert",
    "diff": "espalier.verbs.diff",
    "eval": "espalier.verbs.eval",
    "generate": "espalier.verbs.generate",
    "info": "espalier.verbs.info",
    "merge": "espalier.verbs.merge",
    "merge_report": "espalier.verbs.merge_report",
    "merge_search": "espalier.verbs.merge_search",
    "merge_match": "espalier.verbs.merge_match",
    "methods": "espalier.verbs.methods",
    "plan": "espalier.verbs.plan",
    "pretrain": "espalier.verbs.pretrain",
    "revert": "espalier.verbs.revert",
    "tune": "espalier.verbs.tune",
    "attach": "espalier.attach.attachment",
    "detach": "espalier.attach.attachment",
    "activate": "espalier.attach.attachment",
    "scale": "espalier.attach.attachment",
    "rows": "espalier.attach.rows",
    "choose_task": "espalier.attach.tasks",
    "load": "espalier.attach.load",
    "save": "espalier.exchange.save",
    "EspalierError": "espalier.errors",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


class _Package(ModuleType):
    """Rooms may be named like verbs: importing one does not put its module in the place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
