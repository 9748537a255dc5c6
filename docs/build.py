"""Write the pages of docs/methods from the registry, one per kind of method.

    python docs/build.py            # what `make docs` does
    python docs/build.py --check    # write nothing; exit code 1 when a page is not what it would write

Only the methods of the package itself are listed, so that an installed plugin changes no page. Nothing here imports torch:
the registry reads declarations from source.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from espalier import registry
from espalier.registry import Hyperparameter, MethodInfo

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "methods"
TITLES = {
    "adapt": "Methods of `adapt/`: updates with tensors of their own",
    "branch": "Methods of `branch/`: small modules at named sites of the model",
    "select": "Methods of `select/`: some of the model's own numbers train",
    "optim": "Methods of `optim/`: optimizers",
    "compress": "Methods of `compress/`: smaller deltas",
    "merge": "Methods of `merge/`: several models into one",
    "search": "Methods of `search/`: how a merge is chosen by data",
}
"""Kind -> title of its page; any other kind that has methods gets a plain one."""
OPTION_OF = {
    "adapter": "--method", "brancher": "--method", "optimizer": "--optimizer", "compressor": "--method", "merger": "--method",
    "searcher": "--strategy",
}  # fmt: skip
"""Role -> the option that chooses a method of it."""


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _row(h: Hyperparameter) -> str:
    type_ = h.type
    if type_.startswith("Literal["):
        type_ = type_.removeprefix("Literal[").removesuffix("]").replace("'", "").replace(", ", " or ")
    return f"| `--{h.name.replace('_', '-')}` | {_cell(type_)} | `{h.default}` | {_cell(h.help)} |"


def _docstring(info: MethodInfo) -> str:
    """The whole docstring of a method, from its source."""
    source = (ROOT / "src" / info.file).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == info.attribute:
            return (ast.get_docstring(node) or "").replace("``", "`")
    return ""


def section(info: MethodInfo) -> str:
    """What a page says of one method."""
    lines = [f"## {info.name}", "", _docstring(info), ""]
    lines.append(f"- paper: {info.paper or 'none'}")
    lines.append(f"- ids: {', '.join(f'#{i}' for i in info.ids) or 'none'}")
    lines.append(f"- file: [`src/{info.file}`](../../src/{info.file}), {info.lines} lines")
    if info.role in OPTION_OF:
        lines.append(f"- chosen by: `{OPTION_OF[info.role]} {info.name}`")
    lines += [f"- {name.replace('_', ' ')} by default: `{value}`" for name, value in info.settings.items()]
    if info.hyperparameters:
        lines += ["", "| option | type | default | help |", "| --- | --- | --- | --- |", *map(_row, info.hyperparameters)]
    else:
        lines += ["", "It has no options of its own."]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every page: its file and its text."""
    own = [info for info in registry.methods() if info.file.startswith("espalier/")]
    made = {}
    for kind in dict.fromkeys(info.kind for info in own):
        found = [info for info in own if info.kind == kind]
        head = f"# {TITLES.get(kind, f'Methods of `{kind}/`')}\n\n"
        head += "This page is written by `make docs` from the source of the methods; do not edit it.\n\n"
        head += "".join(f"- [{info.name}](#{info.name}): {info.summary.replace('``', '`')}\n" for info in found)
        made[FOLDER / f"{kind}.md"] = head + "\n" + "\n".join(map(section, found))
    return made


def differences() -> list[str]:
    """The pages on disk that are not what would be written, and those that would not be written at all."""
    wanted = pages()
    found = []
    for page, text in wanted.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            found.append(f"{page.relative_to(ROOT)} is not up to date")
    found += [f"{page.relative_to(ROOT)} is of no kind of method" for page in sorted(FOLDER.glob("*.md")) if page not in wanted]
    return found


def main() -> int:
    """Write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page differs")
    if parser.parse_args().check:
        found = differences()
        for line in found:
            print(f"{line}; run `make docs`", file=sys.stderr)
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for page, text in wanted.items():
        page.write_text(text, encoding="utf-8")
    for page in FOLDER.glob("*.md"):
        if page not in wanted:
            page.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
