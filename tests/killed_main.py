"""The command line, in a process that kills itself (SIGKILL) at a chosen moment of its n-th write.

    python killed_main.py MOMENT N VERB ...

Moments: ``file`` (after the bytes of a file were written, before they are durable), ``rename`` (after a
checkpoint's directory was renamed into place, before the parent directory is durable), ``step`` (after the
optimizer's step N).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def dies_at(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The function, whose ``count``-th call kills the process before it does anything."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def main() -> None:
    """Arm the moment, then run the command line."""
    moment, count = sys.argv[1], int(sys.argv[2])
    sys.argv = ["espalier", *sys.argv[3:]]
    from espalier.checkpoint import atomic

    if moment == "file":
        atomic.fsync_file = dies_at(atomic.fsync_file, count)
    elif moment == "rename":
        atomic.fsync_directory = dies_at(atomic.fsync_directory, count)
    elif moment == "step":
        import torch

        torch.optim.AdamW.step = dies_at(torch.optim.AdamW.step, count)  # type: ignore[method-assign]
    from espalier.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
