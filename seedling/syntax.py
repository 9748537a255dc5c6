"""Does a model write Python that parses? The share of sampled completions that ``ast.parse`` accepts.

Places are drawn from the files of the held-out packages. A place is a token that is nothing but a line end and
the indentation after it: byte-level BPE keeps the two in one token, so a prompt cut between them would begin a
line as no training text does. The model (and, for comparison, the file itself) goes on from there for 64 tokens.
Both are then treated alike:

1. *cut*: what follows the last line end is dropped; a piece without a whole line that is not blank is not accepted;
2. *dedent*: each line loses the smallest indentation of the lines up to and with it. A piece that begins inside
   a block and leaves it, such as the end of one method and the head of the next, thus stays parsable, which
   ``textwrap.dedent`` would refuse however good the text; wherever no line is less indented than the first, both
   give the same. Nothing is added, and no line is dropped;
3. *parse*.

A piece that begins in a docstring, or ends inside brackets or right after a ``def`` line, is refused: for model
and file alike, which is why the bar is on the ratio. Counts under plain ``textwrap.dedent`` are reported too.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 448
"""Tokens of a prompt, at most."""
LENGTH = 64
"""Tokens of a completion."""
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of sampling: what ``espalier generate`` does when it is not told otherwise."""


@dataclass(frozen=True)
class Place:
    """A prompt, the indentation with which its last line begins, and the tokens with which the file goes on."""

    prompt: list[int]
    indentation: str
    continuation: list[int]


def cut(piece: str) -> str:
    """The whole lines of a piece: nothing after its last line end."""
    return piece[: piece.rfind("\n") + 1]


def dedent(lines: str) -> str:
    """Take from each line the smallest indentation of the lines up to it (tabs count as one; blank lines do not count)."""
    least: int | None = None
    result = []
    for line in lines.splitlines(keepends=True):
        if line.strip():
            indentation = len(line) - len(line.lstrip(" \t"))
            least = indentation if least is None else min(least, indentation)
            line = line[least:]
        result.append(line)
    return "".join(result)


def parses(piece: str, dedent: Callable[[str], str] = dedent) -> bool:
    """Whether ``ast.parse`` accepts the piece, cut and dedented."""
    lines = cut(piece)
    if not lines.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are not valid in strings
            ast.parse(dedent(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that the parser raises for bad text
        return False
    return True


def places(documents: list[np.ndarray], tokenizer: Any, count: int, seed: int = 0) -> list[Place]:
    """``count`` places of token documents, drawn uniformly from all; the same for every model with this tokenizer.

    Args:
        documents: token ids with the frame that ``data.encode`` puts around a text.
    """
    from espalier.kernels.philox import Stream

    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    begins_line = np.array([text.isspace() and "\n" in text for text in texts])
    # the last token ends the document and is no text
    found = [(d, at) for d, ids in enumerate(documents) for at in np.flatnonzero(begins_line[ids]) if at + LENGTH < len(ids) - 1]
    result = []
    for index in Stream(seed, "places of the syntax test").choice(len(found), count).tolist():
        document, at = found[index]
        ids = documents[document].tolist()
        indentation = texts[ids[at]].rpartition("\n")[2]
        result.append(Place(ids[max(0, at + 1 - CONTEXT) : at + 1], indentation, ids[at + 1 : at + 1 + LENGTH]))
    return result


def compare(model: PreTrainedModel, tokenizer: Any, drawn: list[Place]) -> Iterator[dict[str, Any]]:
    """For each place the model's piece and the file's, and whether they parse."""
    from espalier.evaluate.sampling import complete

    for number, place in enumerate(drawn):
        made, _ = complete(model, tokenizer, place.prompt, LENGTH, TEMPERATURE, TOP_P, seed=number)
        record: dict[str, Any] = {"prompt": tokenizer.decode(place.prompt, skip_special_tokens=True)}
        for who, ids in (("model", made), ("file", place.continuation)):
            piece = place.indentation + tokenizer.decode(ids, skip_special_tokens=True)
            record[who] = {"text": piece, "parses": parses(piece), "parses_by_textwrap": parses(piece, textwrap.dedent)}
        yield record
