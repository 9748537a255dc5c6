"""Data sets from the source of the running Python's standard library: ``stdlib:NAME`` wherever data are named.

- ``stdlib:train``, ``stdlib:valid``: what seedling was trained on, and files of the same packages kept out;
- ``stdlib:asyncio``, ``stdlib:email``, ``stdlib:xml``: packages kept out entirely; with ``:train`` or
  ``:heldout`` appended, the files to adapt to and those to measure on;
- ``stdlib:docstrings:train``, ``stdlib:docstrings:heldout``: prompt (signature and docstring) and completion
  (body) of the functions of the packages kept out, extracted with ``ast``;
- ``stdlib:packages:train``, ``stdlib:packages:heldout``: docstrings (``text``) of ten packages, and which of them each
  comes from (``label``). A docstring belongs to one half by a hash of its name; one that stands in several places is
  taken at the first.

Only packages that every build ships are used. The files' hashes are recorded in ``stdlib.json``; under
another Python the text differs, which is said once and is no error.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from espalier.checkpoint.atomic import write_text
from espalier.checkpoint.fingerprint import cache_directory
from espalier.errors import EspalierError

HELD_OUT = ("asyncio", "email", "xml")
LABELLED = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "wsgiref", "xml")
"""The packages that docstrings are told apart by: those with the most of them."""
_NOT_EVERYWHERE = frozenset(
    (
        "test", "tests", "idle_test", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip", "turtledemo",
        "site-packages", "dist-packages", "lib-dynload", "__pycache__",
    )
)  # fmt: skip
_RECORD = Path(__file__).with_name("stdlib.json")
NAMES = ("train", "valid", *HELD_OUT, *(f"{p}:{s}" for p in (*HELD_OUT, "docstrings", "packages") for s in ("train", "heldout")))


def library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _share(name: str, of: int) -> int:
    """A number below ``of`` that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % of


@functools.cache
def source_files() -> dict[str, Path]:
    """Relative name -> file, of every source file used; sorted."""
    root = library()
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if any(part in _NOT_EVERYWHERE or part.startswith("config-") for part in folders):
            continue
        if relative.name.startswith(("_sysconfigdata", "turtle")):
            continue
        if folders[:1] == ("encodings",):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "decoding_table" in text or "decoding_map" in text:  # generated character tables
                continue
        if path.stat().st_size:
            found[relative.as_posix()] = path
    return found


def split_of(name: str) -> str:
    """``train``, ``valid``, or ``PACKAGE:train`` / ``PACKAGE:heldout`` for a relative file name."""
    package = name.split("/")[0]
    if package in HELD_OUT:
        return f"{package}:{'heldout' if _share(name, 4) == 0 else 'train'}"
    return "valid" if _share(name, 25) == 0 else "train"


def hashes() -> dict[str, str]:
    """Relative name -> first 16 hex digits of the SHA-256 of the file's text."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in source_files().items()}


@functools.cache
def _warn_when_other() -> None:
    try:
        recorded = json.loads(_RECORD.read_text())
    except FileNotFoundError:
        return
    mine = hashes()
    if other := [name for name, digest in recorded["files"].items() if mine.get(name) != digest]:
        warnings.warn(
            f"the standard library of this Python differs from the one that the published figures are for "
            f"({recorded['python']}): {len(other)} of {len(recorded['files'])} files; figures will differ a little",
            stacklevel=4,
        )


def bundled_files(name: str) -> list[Path]:
    """The files of ``stdlib:NAME``.

    Raises:
        EspalierError: when there is no such data set.
    """
    if name not in NAMES:
        raise EspalierError(f"no data set is called stdlib:{name} (there are: {', '.join('stdlib:' + n for n in NAMES)})")
    _warn_when_other()
    if name.startswith("docstrings:"):
        return [_docstrings(name.partition(":")[2])]
    if name.startswith("packages:"):
        return [_packages(name.partition(":")[2])]
    return [path for file, path in source_files().items() if split_of(file) == name or split_of(file).startswith(name + ":")]


def _pairs(path: Path) -> Iterator[dict[str, str]]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        docstring, *body = node.body
        if not body or body[0].lineno <= (docstring.end_lineno or 0):
            continue
        prompt = "".join(lines[node.lineno - 1 : docstring.end_lineno])
        completion = "".join(lines[docstring.end_lineno : node.end_lineno])
        yield {"prompt": prompt, "completion": completion}


def _docstrings(split: str) -> Path:
    files = [
        (name, path)
        for name, path in source_files().items()
        if split_of(name).partition(":")[2] == split and name.split("/")[0] in HELD_OUT
    ]
    digest = hashlib.sha256("".join(hashes()[name] for name, _ in files).encode()).hexdigest()[:16]
    target = cache_directory() / "stdlib" / f"docstrings-{split}-{digest}.jsonl"
    if not target.exists():
        write_text(target, "".join(json.dumps(pair) + "\n" for _, path in files for pair in _pairs(path)))
    return target


def _named_docstrings(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of everything in a module that has one, in order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own = f"{name}.{node.name}"
            if docstring := ast.get_docstring(node):
                yield own, docstring
            yield from _named_docstrings(node, own)
        else:
            yield from _named_docstrings(node, name)


def _packages(split: str) -> Path:
    files = [(name, path) for name, path in source_files().items() if name.split("/")[0] in LABELLED]
    digest = hashlib.sha256("".join(hashlib.sha256(path.read_bytes()).hexdigest() for _, path in files).encode()).hexdigest()[:16]
    targets = {half: cache_directory() / "stdlib" / f"packages-{half}-{digest}.jsonl" for half in ("train", "heldout")}
    if not targets[split].exists():
        seen: set[str] = set()
        lines: dict[str, list[str]] = {half: [] for half in targets}
        for file, path in files:
            for name, docstring in _named_docstrings(ast.parse(path.read_text(encoding="utf-8")), file):
                if docstring in seen or len(docstring) < 20:
                    continue
                seen.add(docstring)
                half = "heldout" if _share(name, 4) == 0 else "train"
                lines[half].append(json.dumps({"text": docstring, "label": file.split("/")[0]}) + "\n")
        for half, target in targets.items():
            write_text(target, "".join(lines[half]))
    return targets[split]
