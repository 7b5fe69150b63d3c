"""The one exception that means "the caller asked for something impossible", as opposed to a bug."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator


class CompareError(ValueError):
    """A wrong path, a broken file, an unknown name or a number out of range.

    The message is one line, names what was wrong and the way out; the command line prints it and exits with 2.
    """


@contextlib.contextmanager
def as_compare_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Tell in one line, as a `CompareError`, what a call inside raises.

    Args:
        what: Begins the message; the reason follows.
        *kinds: What counts as the caller's mistake; other exceptions pass.

    Raises:
        CompareError: In place of an exception of these kinds.

    Example:
        >>> with as_compare_error("the file is damaged: ", OSError):
        ...     raise OSError("no end")
        Traceback (most recent call last):
        lightning_speedups.measure.errors.CompareError: the file is damaged: no end
    """
    try:
        yield
    except kinds as error:
        reason = textwrap.shorten(str(error), 600, placeholder="…") or type(error).__name__
        raise CompareError(f"{what}{reason}") from error
