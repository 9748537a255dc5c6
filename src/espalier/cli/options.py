"""A verb's command from its function: options from the signature, help from the docstring.

Nothing here imports torch: a verb's module imports it inside its function, and methods' options are read
from their source.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from espalier import registry
from espalier.display import json_of
from espalier.errors import EspalierError, suggestion

Verb = Callable[..., Any]


def argument_help(verb: Verb) -> dict[str, str]:
    """Parameter name to its line under ``Args:`` of the docstring."""
    text = inspect.getdoc(verb) or ""
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^ {4}(\w+): (.+)$", section, re.MULTILINE))


def _unwrapped(annotation: Any) -> tuple[Any, bool]:
    """The type without ``| None``, and whether it is a list."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is list:
        return get_args(annotation)[0], True
    return annotation, False


def _option(name: str, annotation: Any, default: Any, help: str, also: str | None = None) -> click.Parameter:
    kind, many = _unwrapped(annotation)
    flag = f"--{name.replace('_', '-')}"
    required = default is inspect.Parameter.empty
    shown = None if required or default is None or kind is bool else default
    text = f"{help}" + (f"  [default: {shown}]" if shown is not None else "")
    if kind is bool:
        declaration = flag if default is False else f"{flag}/--no-{name.replace('_', '-')}"
        return click.Option([declaration, name], default=None, is_flag=True, help=text)
    if many and kind in (int, float):
        kind = str  # so that 0.5,0.3 is two of them
    type_: Any = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
    # whether a required value is missing is known only after --config has been read
    flags = [flag, also] if also else [flag]
    return click.Option([*flags, name], type=type_, multiple=many, default=None, help=text + ("  [required]" if required else ""))


def _method_options(roles: tuple[str, ...], taken: set[str]) -> list[click.Option]:
    """The options of every method of the roles, each once, naming the methods that have it."""
    owners: dict[str, list[tuple[str, registry.Hyperparameter]]] = {}
    for info in registry.methods():
        if info.role in roles:
            for h in info.hyperparameters:
                if h.name in taken:
                    raise EspalierError(f"{info.file}: the option {h.name} of {info.name} is one of the verb's own")
                owners.setdefault(h.name, []).append((info.name, h))
    options = []
    for name, owned in owners.items():
        kind = owned[0][1].type
        meanings: dict[str, list[str]] = {}
        for method, h in owned:
            meanings.setdefault(h.help or kind, []).append(f"{method} (default {h.default})")
        help = "; ".join(f"{meaning}  [{', '.join(of)}]" for meaning, of in meanings.items())
        metavar = {"int": "INTEGER", "float": "FLOAT", "str": "TEXT", "bool": "BOOLEAN"}.get(kind, kind.upper())
        if kind.startswith("Literal"):
            metavar = kind.removeprefix("Literal").replace("'", "").replace(", ", "|")
        options.append(click.Option([f"--{name.replace('_', '-')}", name], default=None, help=help, metavar=metavar))
        parts = {part for part, of in registry.PARTS.items() for method, _ in owned if registry.find(method).role in of}
        for part in sorted(parts) if len(parts) > 1 else ():
            qualified = f"{part}_{name}"
            help = f"--{name.replace('_', '-')} of the {part}, where method and optimizer both have it"
            options.append(click.Option([f"--{qualified.replace('_', '-')}", qualified], default=None, help=help, metavar=metavar))
    return options


class _Command(click.Command):
    """Prints usage errors with a suggestion of the option that was perhaps meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [opt for p in self.params for opt in p.opts]
            raise EspalierError(f"{self.name} has no option {error.option_name}{suggestion(error.option_name, known)}") from error


def _read_config(path: str, allowed: set[str]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EspalierError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EspalierError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise EspalierError(f"--config {path} holds no options; write lines such as 'rank: 16'")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in values:
        if key not in allowed:
            raise EspalierError(f"--config {path}: {key!r} is no option of this verb{suggestion(key, sorted(allowed))}")
    return values


def command(
    verb: Verb,
    show: Callable[[Any], None],
    *,
    positional: tuple[str, ...] = (),
    roles: tuple[str, ...] = (),
    recipe: bool = False,
    also: Mapping[str, str] | None = None,
) -> click.Command:
    """The command of a verb.

    Args:
        show: prints the result for people, on standard output.
        positional: parameters that are arguments, not options.
        roles: roles of methods whose hyperparameters are options too.
        recipe: whether it takes ``--config recipe.yaml``.
        also: another spelling of the option of a parameter.
    """
    signature, spelt = inspect.signature(verb, eval_str=True), verb.__name__.replace("_", " ")
    help = argument_help(verb)
    params: list[click.Parameter] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if name in positional:
            params.append(click.Argument([name], nargs=-1 if _unwrapped(parameter.annotation)[1] else 1, required=True))
        else:
            params.append(_option(name, parameter.annotation, parameter.default, help.get(name, ""), (also or {}).get(name)))
    own = set(signature.parameters) - {"options"}
    if recipe:
        params.append(click.Option(["--config", "config_file"], help="a YAML file of options; those on the command line win"))
    if roles:
        params.append(click.Option(["--plugin"], multiple=True, help="a Python file that declares further methods"))
        extra = _method_options(roles, own)
        params += extra
        own |= {option.name for option in extra if option.name}
    params.append(click.Option(["--json", "as_json"], is_flag=True, help="print the result as JSON on standard output"))

    def run(**values: Any) -> None:
        as_json, config_file = values.pop("as_json"), values.pop("config_file", None)
        values.pop("plugin", None)
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None and v != ()}
        if config_file:
            given = {**_read_config(config_file, own), **given}
        missing = [
            p.name for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in given
        ]
        if missing:
            options = ", ".join(name.upper() if name in positional else f"--{name.replace('_', '-')}" for name in missing)
            raise EspalierError(f"espalier {spelt} needs {options}; see espalier {spelt} --help")
        for name, parameter in signature.parameters.items():
            if name in given and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                given[name] = registry.coerce(f"--{name.replace('_', '-')}", parameter.annotation, given[name])
        result = verb(**given)
        if as_json:
            print(json.dumps(json_of(result), indent=1, allow_nan=False))
        else:
            show(result)
        sys.stdout.flush()

    summary = (inspect.getdoc(verb) or "").partition("\n")[0]
    return _Command(spelt, params=params, callback=run, help=summary, context_settings={"max_content_width": 110})
