"""Every method that Espalier has, known without running any of their files.

A method is one decorated class or function in a file of a method room. Its annotated fields (or
keyword-only arguments) with literal defaults are its hyperparameters, and the string under each is its
help; its room is its kind. A class also has those of its bases that are dataclasses, wherever in the package they are. This
module reads those declarations from the source, so listing methods or building ``--help`` imports no torch; a file is imported
when its method runs.

Out-of-tree methods come from the entry-point group ``espalier.methods`` (value: a module; the entry's
name is free) or from ``add_plugin(FILE)``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from espalier.errors import EspalierError, suggestion

ROOMS = (
    "adapt", "branch", "select", "optim", "compress", "prune", "quantize", "share", "merge", "search", "edit", "align", "grow", "laws",
)  # fmt: skip
"""The rooms of methods; a room's name is the kind of its methods."""

DECORATORS = ("adapter", "brancher", "optimizer", "compressor", "merger", "searcher")
ATTACHED = ("adapter", "brancher")
"""The roles that ``attach`` and ``tune`` take."""
_PACKAGE = Path(__file__).parent
_plugins: list[Path] = []
T = TypeVar("T")


@dataclass(frozen=True)
class Hyperparameter:
    """One option of a method: its name, its type as written, its default and a line of help."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method from its source.

    ``ids`` are the rows of the paper table that it implements, ``paper`` where it is described, ``lines``
    the length of its file.
    """

    name: str
    kind: str
    role: str
    ids: tuple[int, ...]
    paper: str
    file: str
    lines: int
    summary: str
    settings: dict[str, Any]
    hyperparameters: tuple[Hyperparameter, ...]
    module: str
    attribute: str

    def as_json(self) -> dict[str, Any]:
        """The public record, as ``espalier methods --json`` prints it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "ids": list(self.ids),
            "paper": self.paper,
            "file": self.file,
            "lines": self.lines,
            "summary": self.summary,
            "hyperparameters": [dataclasses.asdict(h) for h in self.hyperparameters],
        }


def declaration(role: str) -> Callable[..., Callable[[T], T]]:
    """Make the decorator that declares methods of one role (``adapter``, ``optimizer``, ...).

    The decorator takes the method's name, ``ids``, ``paper`` and further settings of the role, all literal.
    A class becomes a dataclass of its hyperparameters.
    """

    def decorator(name: str, *, ids: tuple[int, ...], paper: str, **settings: Any) -> Callable[[T], T]:
        def declare(method: T) -> T:
            if isinstance(method, type):
                method = dataclass(method)  # type: ignore[assignment]
            method.name, method.role, method.ids, method.paper = name, role, ids, paper  # type: ignore[attr-defined]
            for key, value in settings.items():
                setattr(method, key, value)
            return method

        return declare

    return decorator


adapter = declaration("adapter")
brancher = declaration("brancher")
optimizer = declaration("optimizer")
compressor = declaration("compressor")
merger = declaration("merger")
searcher = declaration("searcher")


def _docstring_after(body: list[ast.stmt], position: int) -> str:
    if position + 1 < len(body):
        follower = body[position + 1]
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            return " ".join(str(follower.value.value).split())
    return ""


def _fields(node: ast.ClassDef) -> Iterator[Hyperparameter]:
    for position, statement in enumerate(node.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            if ast.unparse(statement.annotation).startswith("ClassVar"):
                continue
            yield Hyperparameter(
                statement.target.id,
                ast.unparse(statement.annotation),
                ast.literal_eval(statement.value),
                _docstring_after(node.body, position),
            )


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _class(name: str, tree: ast.Module) -> tuple[ast.ClassDef, ast.Module] | None:
    """The class that a file means by a name, and the file that it is in: this one, or one of the package that it imports from."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, tree
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith(f"{_PACKAGE.name}."):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    path = _PACKAGE.parent.joinpath(*str(node.module).split("."))
                    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                    return _class(alias.name, _parsed(file)) if file.exists() else None  # what is not there fails where it is imported
    return None


def _of_class(node: ast.ClassDef, tree: ast.Module) -> dict[str, Hyperparameter]:
    """The hyperparameters of a method's class as a dataclass has them: those of bases first, each with its last default."""
    found: dict[str, Hyperparameter] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (there := _class(base.id, tree)) is not None:
            found |= _of_class(*there)
    decorators = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
    if decorators & {"dataclass", "dataclasses.dataclass", *DECORATORS}:
        found |= {field.name: field for field in _fields(node)}
    return found


def _keywords(node: ast.FunctionDef) -> Iterator[Hyperparameter]:
    section = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
    help = dict(re.findall(r"^ {4}(\w+): (.+)$", section, re.MULTILINE))
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if default is not None and argument.annotation is not None:
            yield Hyperparameter(argument.arg, ast.unparse(argument.annotation), ast.literal_eval(default), help.get(argument.arg, ""))


def _declarations(file: Path, kind: str, module: str) -> Iterator[MethodInfo]:
    try:
        source = file.read_text(encoding="utf-8")
        if not any(f"@{name}(" in source for name in DECORATORS):
            return
        tree = ast.parse(source, str(file))
    except (SyntaxError, ValueError) as error:
        raise EspalierError(f"{file} is not Python: {error}") from error
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in DECORATORS):
                continue
            try:
                name = ast.literal_eval(call.args[0])
                settings = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
                hyperparameters = tuple(_of_class(node, tree).values() if isinstance(node, ast.ClassDef) else _keywords(node))
            except (ValueError, IndexError) as error:
                raise EspalierError(f"{file}:{node.lineno}: the declaration of {node.name} is not literal ({error})") from error
            yield MethodInfo(
                name=name,
                kind=kind,
                role=call.func.id,
                ids=tuple(settings.pop("ids", ())),
                paper=settings.pop("paper", ""),
                file=str(file.relative_to(_PACKAGE.parent)) if file.is_relative_to(_PACKAGE) else str(file),
                lines=source.count("\n"),
                summary=(ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "),
                settings=settings,
                hyperparameters=hyperparameters,
                module=module,
                attribute=node.name,
            )


def _entry_points() -> Iterator[tuple[Path, str]]:
    from importlib.metadata import entry_points

    for entry in entry_points(group="espalier.methods"):
        found = importlib.util.find_spec(entry.value)
        if found and found.origin:
            yield Path(found.origin), entry.value


def add_plugin(file: Path) -> None:
    """Also look for methods in one Python file; its kind is the name of its folder when that is a room, else adapt.

    Raises:
        EspalierError: when the file cannot be read or declares no method.
    """
    file = Path(file).resolve()
    if not file.is_file():
        raise EspalierError(f"plugin {file} does not exist; give a Python file that declares a method")
    if not list(_declarations(file, "adapt", "")):
        raise EspalierError(f"plugin {file} declares no method (a class or function under @{' or @'.join(DECORATORS)})")
    if file not in _plugins:
        _plugins.append(file)
        methods.cache_clear()


@functools.cache
def methods() -> tuple[MethodInfo, ...]:
    """Every method, sorted by kind and name.

    Raises:
        EspalierError: when two declare the same name.
    """
    found: list[MethodInfo] = []
    for room in ROOMS:
        for file in sorted((_PACKAGE / room).glob("*.py")):
            found += _declarations(file, room, f"espalier.{room}.{file.stem}")
    for file, module in _entry_points():
        found += _declarations(file, file.parent.name if file.parent.name in ROOMS else "adapt", module)
    for number, file in enumerate(_plugins):
        kind = file.parent.name if file.parent.name in ROOMS else "adapt"
        found += _declarations(file, kind, f"espalier_plugin_{number}_{file.stem}")
    seen: dict[str, MethodInfo] = {}
    for info in found:
        if info.name in seen:
            raise EspalierError(f"two methods are called {info.name!r}: {seen[info.name].file} and {info.file}")
        seen[info.name] = info
    return tuple(sorted(found, key=lambda info: (ROOMS.index(info.kind), info.name)))


def find(name: str, role: str | tuple[str, ...] | None = None) -> MethodInfo:
    """The method called ``name``, of that role (or of one of them).

    Raises:
        EspalierError: when there is none, listing those of the role.
    """
    roles = (role,) if isinstance(role, str) else role
    known = [info for info in methods() if roles is None or info.role in roles]
    for info in known:
        if info.name == name:
            return info
    names = [info.name for info in known]
    raise EspalierError(f"no {roles[0] if roles and len(roles) == 1 else 'method'} is called {name!r}{suggestion(name, names)} (there are: {', '.join(names)})")


def load(info: MethodInfo) -> Any:
    """Import a method's file and return its class or function."""
    if info.module in sys.modules:
        return getattr(sys.modules[info.module], info.attribute)
    if not info.module.startswith("espalier_plugin_"):
        return getattr(importlib.import_module(info.module), info.attribute)
    found = importlib.util.spec_from_file_location(info.module, info.file)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[info.module] = module
    found.loader.exec_module(module)
    return getattr(module, info.attribute)


def coerce(name: str, annotation: Any, value: Any) -> Any:
    """``value`` (perhaps a string from a command line) as the annotated type.

    Raises:
        EspalierError: naming the option, the value and the type.
    """
    from pydantic import TypeAdapter, ValidationError

    texts = [value] if isinstance(value, str) else value
    if "list[" in str(annotation) and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        listed = "str" in str(annotation) and texts is value  # paths may hold commas
        value = texts if listed else [item.strip() for text in texts for item in text.split(",") if item.strip()]
    try:
        made = TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise EspalierError(f"{name} is {value!r}: {error.errors()[0]['msg'].lower()}") from error
    for number in made if isinstance(made, list) else [made]:
        if isinstance(number, float) and not math.isfinite(number):
            raise EspalierError(f"{name} is {number}; it must be a finite number")
    return made


def options_of(name: str, role: str | tuple[str, ...], hyperparameters: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A method's class or function, and the given hyperparameters as its types.

    Raises:
        EspalierError: for an unknown method, an unknown hyperparameter or a value of another type.
    """
    info = find(name, role)
    known = [h.name for h in info.hyperparameters]
    for option in hyperparameters:
        if option not in known:
            owners = [m.name for m in methods() if m.role in ((role,) if isinstance(role, str) else role) and option in [h.name for h in m.hyperparameters]]
            belongs = f" (it belongs to {', '.join(owners)})" if owners else suggestion(option, known)
            raise EspalierError(f"{option} is no option of {name}{belongs}; {name} has: {', '.join(known) or 'none'}")
    method = load(info)
    hints = get_type_hints(method)
    return method, {option: coerce(option, hints[option], value) for option, value in hyperparameters.items()}


def make(name: str, role: str | tuple[str, ...], **hyperparameters: Any) -> Any:
    """A method of a class-based role with the given hyperparameters, checked.

    Raises:
        EspalierError: for an unknown method, an unknown hyperparameter or a value out of range.
    """
    method, options = options_of(name, role, hyperparameters)
    made = method(**options)
    made._given = frozenset(options)
    made.check()
    return made


PARTS = {"method": ATTACHED, "optimizer": ("optimizer",)}
"""What a training run is made of: part to roles. An option that methods of both have is spelt with its part in front."""


def share_out(
    parts: Mapping[str, MethodInfo], options: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], str]]:
    """Give each part of a run the options that are its own.

    Args:
        parts: such as ``{"method": info, "optimizer": info}``.
        options: by name; one that several have is qualified by the part, such as ``optimizer_rank``. One that only one has may be.

    Returns:
        The options of each part; and how every option of a part, (part, name), is spelt.

    Raises:
        EspalierError: for an option that several have and that is not qualified, and for one that none has.
    """
    owners: dict[str, list[str]] = {}
    for part, info in parts.items():
        for h in info.hyperparameters:
            owners.setdefault(h.name, []).append(part)
    spelt = {(part, name): name if len(of) == 1 else f"{part}_{name}" for name, of in owners.items() for part in of}
    given: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for option, value in options.items():
        part, _, name = option.partition("_")
        if (part, name) in spelt:
            if name in options and spelt[part, name] == name:
                raise EspalierError(f"give --{name.replace('_', '-')} or --{option.replace('_', '-')}, which mean the same here, not both")
            given[part][name] = value
        elif len(of := owners.get(option, [])) > 1:
            meant = " or ".join(f"--{one}-{option.replace('_', '-')} for {parts[one].name}" for one in of)
            raise EspalierError(f"--{option.replace('_', '-')} is an option of {' and of '.join(parts[one].name for one in of)}; give {meant}")
        else:
            given[of[0] if of else next(iter(parts))][option] = value
    return given, spelt


def make_below(above: Any, name: str, role: str, option: str = "rule", shared: Iterable[str] | None = None) -> Any:
    """A method that another one stands on, which has an option for it.

    It has the hyperparameters of that one that both have; where it is not that option's default, only those that were given: what
    is a good epsilon for one rule is none for another. What comes of it is what both have afterwards, so that records tell it, and
    counts as given.

    Args:
        shared: hyperparameters of ``above`` that are those of the other one too; default: all.

    Raises:
        EspalierError: as :func:`make`.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(above)}
    both = [h.name for h in find(name, role).hyperparameters if h.name in (defaults if shared is None else shared)]
    given: frozenset[str] = getattr(above, "_given", frozenset())
    is_usual = name == defaults[option]
    made = make(name, role, **{h: getattr(above, h) for h in both if is_usual or h in given or getattr(above, h) != defaults[h]})
    for h in both:
        setattr(above, h, getattr(made, h))
    above._given = given.union(both)
    return made
