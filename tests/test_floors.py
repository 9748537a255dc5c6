"""Rooms and floors: every import inside the package goes down. The floors are those of docs/architecture.md.

Imports are read from the source, those inside functions too. What the registry and the command line import by
name at run time (a method's file, a verb's) is no import here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from espalier import registry

PACKAGE = Path(registry.__file__).parent
FLOORS = (
    ("errors",),
    ("kernels", "registry", "checkpoint", "display"),
    ("bundled", "anatomy"),
    ("data", "delta"),
    ("attach", "memory"),
    ("calibrate", "budget"),
    registry.ROOMS,
    ("train", "evaluate", "exchange"),
    ("plan",),
    ("verbs",),
    ("cli",),
)
"""From the ground up. A room is a folder, or a file of the package itself."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOT = ("__init__", "__main__")
"""The package itself, which gives its verbs out by name, and ``python -m espalier``: they stand above all rooms."""
FACTS = frozenset({"__version__"})
"""What any room may ask of the package itself."""


def room_of(file: Path) -> str:
    """The room of a source file."""
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything of espalier that a file imports; ``package`` is what its dots stand on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "espalier")
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            if module.split(".")[0] == "espalier":
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imports() -> Iterator[tuple[str, str, str, str]]:
    """(where, importing room, imported room, full name) of every import inside the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE.parent)
        package = ".".join(relative.parts[:-1])
        for line, name in modules(ast.parse(file.read_text(encoding="utf-8"), str(file)), package):
            imported = name.split(".")[1] if "." in name else "__init__"
            yield f"{relative}:{line}", room_of(file), imported, name


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")} - set(ROOT)
    assert rooms <= set(FLOOR_OF), f"no floor is given for {sorted(rooms - set(FLOOR_OF))}; docs/architecture.md and FLOORS need it"


def test_every_import_goes_down_or_stays_in_its_room() -> None:
    wrong = []
    for where, room, imported, name in imports():
        if room in ROOT or room == imported or imported in FACTS:
            continue
        if imported not in FLOOR_OF or FLOOR_OF[imported] >= FLOOR_OF[room]:
            wrong.append(f"{where}: {room} (floor {FLOOR_OF[room]}) imports {name} (floor {FLOOR_OF.get(imported, 'none')})")
    assert not wrong, "\n".join(wrong)


def test_a_method_file_is_imported_by_nothing() -> None:
    wrong = [f"{where}: {name}" for where, _, imported, name in imports() if imported in registry.ROOMS]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from espalier.data.store import open_store", ["espalier.data.store.open_store"]),
        ("def f():\n    import espalier.cli.main", ["espalier.cli.main"]),
        ("from espalier import registry, __version__", ["espalier.registry", "espalier.__version__"]),
        ("from . import loop", ["espalier.train.loop"]),
        ("from ..cli import main", ["espalier.cli.main"]),
        ("import torch\nfrom pathlib import Path", []),
    ],
)
def test_imports_are_read_in_every_spelling(source: str, found: list[str]) -> None:
    assert [name for _, name in modules(ast.parse(source), "espalier.train")] == found


def test_the_architecture_page_names_every_room() -> None:
    text = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    present = {room_of(file) for file in PACKAGE.rglob("*.py")} - set(ROOT)
    missing = [room for room in sorted(present) if f"`{room}`" not in text and f"`{room}/`" not in text and f"`{room}.py`" not in text]
    assert not missing, f"docs/architecture.md does not name: {', '.join(missing)}"
