"""``espalier VERB ...``: finds the verb's file, and turns errors into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from espalier.errors import EspalierError, suggestion

VERBS = {
    "plan": "what a training job will need in memory, said before anything runs",
    "tune": "adapt a model to data within a memory budget",
    "pretrain": "train a model from raw text",
    "eval": "loss, perplexity and bits per byte, with or without deltas",
    "generate": "continue a prompt, with or without deltas",
    "apply": "write the model that a base becomes under deltas",
    "revert": "take deltas off a model that apply wrote",
    "diff": "the delta between two checkpoints",
    "convert": "a delta into another form or a PEFT adapter; a PEFT adapter into a delta",
    "merge": "several models or deltas into one",
    "merge report": "how models relate before they are merged: conflicts, overlap, subspaces, loss between them",
    "merge search": "the merge of models that does best on data",
    "merge match": "line up the units of two models trained apart, and merge them as far as a width allows",
    "compress": "make a delta smaller",
    "calibrate": "statistics of what data do inside a model, block by block",
    "info": "what is in a model, a delta, a run or a data set",
    "methods": "list every method, its papers and options",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            raise EspalierError(f"espalier has no verb {name!r}{suggestion(name, list(VERBS))} (there are: {', '.join(VERBS)})")
        module = importlib.import_module(f"espalier.cli.{name.replace(' ', '_')}")
        return module.command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if (both := " ".join(args[:2])) in VERBS:  # a verb of two words
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["--help", "-h"]})
@click.version_option(package_name="espalier")
@click.pass_context
def espalier(ctx: click.Context) -> None:
    """Change large open-weight models within the memory, disk, bandwidth and time you have."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _plugins(arguments: list[str]) -> None:
    from espalier import registry

    for position, argument in enumerate(arguments):
        if argument == "--plugin" and position + 1 < len(arguments):
            registry.add_plugin(Path(arguments[position + 1]))
        elif argument.startswith("--plugin="):
            registry.add_plugin(Path(argument.partition("=")[2]))


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; exit code 0, 1 for a bug, 2 for bad input, 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module="espalier", category=UserWarning)
    warnings.showwarning = _show_warning
    try:
        _plugins(sys.argv[1:])
        espalier.main(standalone_mode=False)
    except EspalierError as error:
        sys.exit(_fail(str(error)))
    except click.ClickException as error:
        sys.exit(_fail(error.format_message()))
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_fail(f"the operating system says: {error.strerror or error}{where}"))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
