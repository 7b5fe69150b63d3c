"""The command line: calls the package, prints what it says."""

from __future__ import annotations

import re
import sys
from typing import Any

from lightning_speedups_command import INTERRUPTED, USAGE_ERROR, flag
from lightning_speedups_command import main as main


def run(list_arms: bool, **options: Any) -> int:
    """Do what ``compare`` was asked for.

    Args:
        list_arms: Whether to show the arms and stop.
        **options: Arguments of `lightning_speedups.measure.compare`.

    Returns:
        Exit code: 0, 2 for a wrong call, 130 after a Ctrl-C.
    """
    try:
        from rich.console import Console

        from lightning_speedups.measure import TASKS, CompareError, compare
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: pip install 'lightning-speedups[bench]'")
    if list_arms:
        sys.stdout.writelines(
            f"{arm.name:<10} {arm.description}{' (by name only)' * arm.on_request}\n"
            for arm in TASKS[options["task"]].arms.values()
        )
        return 0
    try:
        result = compare(**options)
    except CompareError as error:
        # where the function speaks of its argument, the command line's user knows an option
        return _fail(re.sub(r"`(\w+)`", lambda name: flag(name[1]) if name[1] in options else name[0], str(error)))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a table is not lost for a sign that the terminal lacks
    # a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 100).print(result.table())
    sys.stdout.write(f"Written: {options['out']}/compare.png and {options['out']}/compare.json\n")
    return INTERRUPTED if result.interrupted else 0


def _fail(message: str) -> int:
    sys.stderr.write(f"lightning-speedups compare: error: {message}\n")
    return USAGE_ERROR
