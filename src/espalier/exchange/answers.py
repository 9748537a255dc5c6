"""What a search was told, one line each, on the disk before it goes on: a search that was killed hears the same again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError


class Answers:
    """A file of answers in the order in which they were asked for.

    Args:
        path: the file; what it holds is taken as answers to the first questions. A last line that was cut off is dropped.

    Raises:
        EspalierError: when the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: list[dict[str, Any]] = []
        self._place = 0
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                assert isinstance(record["asked"], str)
            except (ValueError, TypeError, KeyError, AssertionError) as error:
                raise EspalierError(f"{path}:{number} is no answer of a search; remove the directory and begin anew") from error
            self.known.append(record)
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    @property
    def replaying(self) -> bool:
        """Whether the next answer is known."""
        return self._place < len(self.known)

    def to(self, question: Any, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The answer to a question, which ``find`` gives where it is not known yet.

        Args:
            question: all that decides the answer, as JSON can hold it.

        Raises:
            EspalierError: when the answer that is known is to another question.
        """
        asked = hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if self.replaying:
            record = self.known[self._place]
            if record["asked"] != asked:
                raise EspalierError(
                    f"{self.path}:{self._place + 1} answers another question than this search asks; "
                    "was another version of a method, or other data, at work? Remove the directory and begin anew"
                )
        else:
            record = json.loads(json.dumps({**find(), "asked": asked}, allow_nan=False))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.known.append(record)
        self._place += 1
        return record
