"""The one exception that users see, and how it is worded.

Anything wrong with what the user gave (a file, an option, a budget) raises ``EspalierError`` with a
message that names the thing, the value seen and what would be right. The command line prints it as one
line and exits with code 2. A bug of ours raises anything else, with a traceback.
"""

from __future__ import annotations


class EspalierError(Exception):
    """Bad input: the message says what was wrong, the value seen, what would be right, and where."""


class NotFiniteError(EspalierError):
    """A loss, gradient or parameter became NaN or infinite; names step, batch and parameter."""


def at_least(name: str, value: float, least: float) -> None:
    """Refuse ``value`` below ``least``, naming the option.

    Raises:
        EspalierError: when ``value < least``.
    """
    if not value >= least:
        raise EspalierError(f"{name} is {value!r}; it must be at least {least}")


def within(name: str, value: float, least: float, most: float) -> None:
    """Refuse ``value`` outside ``[least, most]``, naming the option.

    Raises:
        EspalierError: when it is not between them.
    """
    if not least <= value <= most:
        raise EspalierError(f"{name} is {value!r}; it must be from {least} to {most}")


def one_of(name: str, value: object, allowed: tuple[object, ...] | list[object]) -> None:
    """Refuse ``value`` that is not among ``allowed``, listing them.

    Raises:
        EspalierError: when ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise EspalierError(f"{name} is {value!r}; it must be one of: {', '.join(map(str, allowed))}")


def suggestion(word: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
