"""Methods: every registered method, with its papers and options."""

from __future__ import annotations

from typing import Any


def methods(*, kind: str | None = None) -> list[dict[str, Any]]:
    """Every registered method: its kind, the papers that it implements, its file and its options.

    Args:
        kind: only those of one kind (a room: adapt, select, optim, ...)

    Returns:
        A list of {name, kind, ids, paper, file, lines, summary, hyperparameters: [{name, type, default, help}]}.

    Raises:
        EspalierError: when there is no such kind.
    """
    from espalier import registry
    from espalier.errors import one_of

    if kind is not None:
        one_of("--kind", kind, registry.ROOMS)
    return [info.as_json() for info in registry.methods() if kind in (None, info.kind)]
