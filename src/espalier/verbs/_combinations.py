"""What cannot go together in a training run, refused by name before anything is read or loaded, with what would go.

What depends on the shapes of what trains is refused by the optimizer (``Rule.check_shapes``) once a step has been traced, which loads
nothing either; what depends on the model, where the method is put on it.
"""

from __future__ import annotations

from typing import Any

from espalier.attach.method import Method
from espalier.errors import EspalierError


def refuse(method: Method, optimizer: Any) -> None:
    """Refuse a combination of method and optimizer.

    Raises:
        EspalierError: naming both sides, and what would go.
    """
    if method.state_policy != "keep" and getattr(optimizer, "chooses_among_all", False):
        raise EspalierError(
            f"{optimizer.name} --split blocks chooses among all matrices, of which {method.name} moves only some at a time; "
            "give another --split, such as columns"
        )
