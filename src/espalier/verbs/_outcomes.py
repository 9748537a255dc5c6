"""What became of a delta's updates, for people."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.delta.compression import Outcome
from espalier.display import Display

WORST = 8
"""How many parameters the table of the worst shows."""


def show_worst(outcomes: Sequence[Outcome], display: Display) -> None:
    """A table of the parameters that lost most."""
    known = sorted((o for o in outcomes if o.error), key=lambda o: -(o.error or 0.0))
    rows = [(o.name, o.was, o.form, o.bytes_before, o.bytes, f"{o.error:.2%}") for o in known[:WORST]]
    if rows:
        columns = ("parameter", "was", "is", "bytes before", "bytes", "error")
        display.table(f"{len(known)} of {len(outcomes)} updates are approximated; the worst:", columns, rows)
    else:
        unknown = sum(o.error is None for o in outcomes)
        display.note("every update is exact" if not unknown else f"the errors of {unknown} updates need the base (--model BASE) to be known")
