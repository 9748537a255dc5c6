"""What people see while a verb runs: notes, tables and progress bars on standard error.

On a terminal these are live; elsewhere a line is printed now and then, so that a log file stays readable.
Standard output is left to results.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_EVERY = 10.0
"""Seconds between the lines that stand for a bar where there is no terminal."""


class Display:
    """Notes, tables and bars; silent when ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: Progress | None = None

    @property
    def console(self) -> Console:
        from rich.console import Console

        if self._live is not None:  # what is written beside a bar goes above it
            return self._live.console
        return Console(file=sys.stderr, highlight=False, emoji=False, quiet=self.quiet)

    def note(self, text: str, style: str = "") -> None:
        """One line (or paragraph) of text."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that should not be missed."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are right-aligned."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        for position, column in enumerate(columns):
            numeric = all(not isinstance(row[position], str) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row])
        self.console.print(table)

    def spans(self, title: str, spans: Sequence[tuple[str, bool]]) -> None:
        """Text of which some spans are targets: those are coloured (and, without colour, bracketed)."""
        from rich.text import Text

        console = self.console
        text = Text()
        for piece, is_target in spans:
            if console.is_terminal:
                text.append(piece, style="bold green" if is_target else "dim")
            else:
                text.append(f"[[{piece}]]" if is_target and piece else piece)
        console.print(title, style="bold", markup=False)
        console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
        """A progress bar; yields ``update(done, **fields)``, whose fields are shown beside it. Bars may be nested."""
        if self.quiet:
            yield lambda done, **fields: None
            return
        console = self.console
        if not console.is_terminal:
            yield self._lines(what, total, unit)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        outer = self._live
        with contextlib.ExitStack() as stack:
            progress = outer or stack.enter_context(Progress(*columns, console=console, refresh_per_second=4))
            task = progress.add_task(what, total=total, info="")

            def update(done: int, **fields: Any) -> None:
                progress.update(task, completed=done, info=_joined(fields))

            self._live = progress
            try:
                yield update
            finally:
                self._live = outer
                if outer is not None:
                    outer.remove_task(task)

    def _lines(self, what: str, total: int, unit: str) -> Callable[..., None]:
        began = last = time.monotonic()
        first: int | None = None
        ended = False

        def update(done: int, **fields: Any) -> None:
            nonlocal last, first, ended
            now = time.monotonic()
            first = done if first is None else first
            if now - last < LINE_EVERY and (ended or done < total):
                return
            last, ended = now, done >= total
            left = (now - began) / max(done - first, 1) * (total - done)
            self.note(f"{what} {done}/{total}{unit and ' ' + unit} {_joined(fields)} {now - began:.0f}s, {left:.0f}s left")

        return update


def _joined(fields: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in fields.items())


def json_of(value: Any) -> Any:
    """A result as JSON has it, in which numbers that are not finite are null."""
    if isinstance(value, dict):
        return {key: json_of(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_of(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
