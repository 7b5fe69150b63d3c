"""The one exception that means "the caller asked for something impossible", as opposed to a bug."""

from __future__ import annotations

__all__ = ["CompareError"]


class CompareError(ValueError):
    """A wrong path, a broken file, an unknown name or a number out of range.

    The message is one line, names what was wrong and the way out; the command line prints it and exits with 2.
    """
