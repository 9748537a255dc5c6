"""The package's own names."""

from __future__ import annotations

import importlib
import pkgutil

import espalier


def test_rooms_do_not_hide_verbs() -> None:
    """``espalier.attach`` is the function, also once the room ``attach/`` has been imported."""
    for module in pkgutil.iter_modules(espalier.__path__):
        if module.name != "__main__":
            importlib.import_module(f"espalier.{module.name}")
    assert all(callable(getattr(espalier, name)) for name in espalier.__all__)
    assert espalier.attach.__module__ == "espalier.attach.attachment"
