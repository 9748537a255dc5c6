"""The command line in a process of its own, which a test may arm to kill itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from espalier.checkpoint import atomic
from espalier.cli.main import main


def command_line(*arguments: object, before: Callable[[], None] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``espalier`` with these arguments in another process; ``before`` is called in it first.

    It is a fork of this one, where everything has been imported, so it begins in no time.
    """
    command = ["espalier", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(), sys.stderr.flush()
        if not (child := os.fork()):
            status = 1
            try:
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.update({"OMP_NUM_THREADS": "1", **environment})
                sys.argv, warnings.filters = command, []
                if before is not None:
                    before()
                main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        returned = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(command, returned, out.read().decode(), err.read().decode())


def arm(moment: str, count: int) -> None:
    """Make this process kill itself (SIGKILL) at the ``count``-th of a kind of moments.

    Args:
        moment: ``file`` (after the bytes of a file were written, before they are durable), ``rename`` (after a
            checkpoint's directory was renamed into place, before the parent directory is durable), ``step`` (before the
            optimizer's step).
        count: from 1.
    """
    if moment == "step":
        torch.optim.AdamW.step = _dies_at(torch.optim.AdamW.step, count)  # type: ignore[method-assign]
        return
    name = {"file": "fsync_file", "rename": "fsync_directory"}[moment]
    setattr(atomic, name, _dies_at(getattr(atomic, name), count))


def _dies_at(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The function, whose ``count``-th call kills the process before it does anything."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped
