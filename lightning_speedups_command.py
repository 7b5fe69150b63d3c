"""The command line: what can be asked for. Outside the package, whose import takes seconds."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

VERSION = "0.1.0"
DEFAULT_MODEL = "convnet"
TASKS = ("images", "text", "lines")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
USAGE_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Option:
    """What is told of one setting, and asked of its value.

    Attributes:
        default: Its value unless something is asked for.
        meaning: What it is, in the words of the help.
        range: Lowest and highest value of a number; the lowest itself is forbidden to a ``float``.
        unset: What the default ``None`` stands for.
        kind: Type of its value; a ``bool`` is a switch that is off.
        metavar: What stands for its value in the help.
        choices: The words to choose from; ``None`` where any will do.
    """

    default: Any
    meaning: str
    range: tuple[int, int] | None = None
    unset: str | None = None
    kind: type = int
    metavar: str = "N"
    choices: tuple[str, ...] | None = None

    @property
    def help(self) -> str:
        """Meaning, range and default in one line."""
        numbers = f", {'above ' * (self.kind is float)}{self.range[0]} to {self.range[1]}" if self.range else ""
        words = f", one of {', '.join(self.choices)}" if self.choices else ""
        default = f" (default: {self.unset or self.default})" if self.kind is not bool else ""
        return self.meaning + numbers + words + default


def _option(default: Any, meaning: str, *rule: Any, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(default, meaning, *rule, **more)})


@dataclass(frozen=True)
class Asked:
    """What can be asked of a comparison: a setting is one field, from which its check, its help and its option come."""

    task: str = _option("images", "what to train for", kind=str, metavar="NAME", choices=TASKS)
    model: str = _option(DEFAULT_MODEL, "a timm model, or the small network convnet", kind=str, metavar="NAME")
    weights: str | None = _option(
        None, "what finetune and freeze start from: a weight file, or 'pretrained' for timm's own",
        unset="a network trained on quarter turns of the images", kind=str, metavar="PATH",
    )  # fmt: skip
    seeds: int | None = _option(None, "runs of each arm", (1, 100), "2, quick 1")
    epochs: int | None = _option(None, "epochs of each run", (1, 1000), "8, quick 6; text 1; lines 4, quick 2")
    batch_size: int | None = _option(None, "samples in a training batch", (2, 65536), "64, text 32")
    lr: float | None = _option(None, "constant rate of plain", (0, 10), "0.02, text 0.001, lines 0.002", float)
    samples: int | None = _option(
        None, "training images, windows of text, or lines", (10, 10**7),
        "8000, quick 3000; yours: all; text 28800, quick 3200; lines 20000, quick 4000",
    )  # fmt: skip
    test_samples: int | None = _option(
        None, "test images, windows or lines", (10, 10**7),
        "2000, quick 1000; yours: 2000; text 500, quick 200; lines 2000, quick 500",
    )  # fmt: skip
    width: int | None = _option(
        None, "channels of convnet's stem, or features of a token", (4, 1024), "16, text 128, lines 64"
    )
    image_size: int | None = _option(None, "side of a folder's images, in pixels", (8, 512), "64 or less")
    target: float | None = _option(
        None, "accuracy, or of text loss, to reach", (0, 1), "the worst that a plain run ends with", float
    )
    pretrain_epochs: int | None = _option(None, "epochs before finetune and freeze", (1, 1000), "half of the epochs")
    accelerator: str = _option("auto", "what to train on", kind=str, metavar="NAME", choices=ACCELERATORS)
    threads: int | None = _option(None, "torch's threads", (1, 1024), "torch's choice")
    quick: bool = _option(False, "one seed, fewer samples and epochs: under a minute on two cores", kind=bool)


OPTIONS: dict[str, Option] = {one.name: one.metadata["option"] for one in fields(Asked)}


def flag(name: str) -> str:
    """The option of a setting's name.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage above an error; one line says it better."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-speedups", description="Tricks that make Lightning trainings faster, measured.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="train plainly and with the tricks, and show what each of them brings",
        description="Trains the same small network on the same real images, or text, plainly and with the tricks, "
        "several seeds, interleaved. Prints a table and writes compare.png and compare.json. Nothing is downloaded, "
        "unless by --weights pretrained.",
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
            add(flag(name), action="store_true", help=option.help)
        else:
            add(flag(name), type=option.kind, default=option.default, metavar=option.metavar, help=option.help)
    add("--out", default="compare-results", metavar="DIR", help="folder for the results (default: %(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bars")
    return parser


@contextlib.contextmanager
def _telling(what: str, *, shown: bool) -> Iterator[None]:
    """A word on the terminal for as long as something takes."""
    shown = shown and sys.stderr.isatty()
    if shown:
        sys.stderr.write(what)
        sys.stderr.flush()
    yield
    if shown:
        sys.stderr.write(f"\r{' ' * len(what)}\r")
        sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        Exit code: 0, 2 for a wrong call, 130 after a Ctrl-C.
    """
    try:
        options = vars(_parser().parse_args(argv))
        with _telling("importing torch and Lightning ...", shown=options["progress"]):
            from lightning_speedups.cli import run
        return run(**options)
    except SystemExit as exit_:  # of --help and of a wrong call
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted before the first run: nothing measured\n")
        return INTERRUPTED
