"""The command line: parses arguments, calls the package, prints what it says."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning_speedups import __version__
from lightning_speedups.measure.settings import OPTIONS

USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage above an error; one line says it better."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-speedups", description="Tricks that make Lightning trainings faster, measured.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="train plainly and with the tricks, and show what each of them brings",
        description="Trains the same small network on the same real images plainly and with the tricks, several seeds, "
        "interleaved. Prints a table and writes compare.png and compare.json. Nothing is downloaded, unless by "
        "--weights pretrained.",
    )
    add = compare.add_argument
    add(
        "--arms",
        metavar="A,B,...",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        help="arms to train, separated by commas (default: all but those that must be named; --list-arms shows them)",
    )
    add("--list-arms", action="store_true", help="show the arms and stop")
    add(
        "--data",
        metavar="PATH",
        help="your images: an .npz file (x_train, y_train, x_test, y_test; uint8 NHWC or NHW) or a folder with "
        "train/CLASS/* and test/CLASS/* (default: collages of scikit-learn's handwritten digits)",
    )
    for name, option in OPTIONS.items():
        if option.kind is bool:
            add(_flag(name), action="store_true", help=option.help)
        else:
            add(_flag(name), type=option.kind, default=option.default, metavar=option.metavar, help=option.help)
    add("--out", default="compare-results", metavar="DIR", help="folder for the results (default: %(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bars")
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _compare(list_arms: bool, **options: Any) -> int:
    try:
        from rich.console import Console

        from lightning_speedups.measure import ARMS, CompareError, compare
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: pip install 'lightning-speedups[bench]'")
    if list_arms:
        sys.stdout.writelines(
            f"{arm.name:<10} {arm.description}{' (by name only)' * arm.on_request}\n" for arm in ARMS.values()
        )
        return 0
    try:
        result = compare(**options)
    except CompareError as error:
        # where the function speaks of its argument, the command line's user knows an option
        return _fail(re.sub(r"`(\w+)`", lambda name: _flag(name[1]) if name[1] in options else name[0], str(error)))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a table is not lost for a sign that the terminal lacks
    # a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 100).print(result.table())
    sys.stdout.write(f"Written: {options['out']}/compare.png and {options['out']}/compare.json\n")
    return INTERRUPTED if result.interrupted else 0


def _fail(message: str) -> int:
    sys.stderr.write(f"lightning-speedups compare: error: {message}\n")
    return USAGE_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        Exit code: 0, 2 for a wrong call, 130 after a Ctrl-C.
    """
    try:
        return _compare(**vars(_parser().parse_args(argv)))
    except SystemExit as exit_:  # of --help and of a wrong call
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted before the first run: nothing measured\n")
        return INTERRUPTED
