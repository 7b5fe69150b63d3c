"""The command line: parses arguments, calls the package, prints what it says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata, util
from typing import NoReturn

__all__ = ["main"]

USAGE_ERROR = 2
INTERRUPTED = 130
# What the extra "bench" brings: module name and the name to install
BENCH = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "torchvision": "torchvision"}


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage above an error; one line says it better."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-speedups", description="Tricks that make Lightning trainings faster, measured.")
    version = f"lightning-speedups {metadata.version('lightning-speedups')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="train plainly and with the tricks, and show what each of them brings",
        description="Trains the same small network on the same real images plainly and with the tricks, several seeds, "
        "interleaved. Prints a table and writes compare.png and compare.json. Nothing is downloaded, unless by "
        "--weights pretrained.",
    )
    add = compare.add_argument
    add("--quick", action="store_true", help="one seed, fewer samples and epochs: under a minute on two cores")
    add(
        "--arms",
        metavar="A,B,...",
        help="arms to train, separated by commas (default: all but those that must be named; --list-arms shows them)",
    )
    add("--list-arms", action="store_true", help="show the arms and stop")
    add(
        "--data",
        metavar="PATH",
        help="your images: an .npz file (x_train, y_train, x_test, y_test; uint8 NHWC or NHW) or a folder with "
        "train/CLASS/* and test/CLASS/* (default: collages of scikit-learn's handwritten digits)",
    )
    add("--model", default="convnet", metavar="NAME", help="a timm model, or the small network %(default)r (default)")
    add(
        "--weights",
        metavar="PATH",
        help="what finetune and freeze start from: a weight file, or 'pretrained' for timm's own (default: a network "
        "trained on quarter turns of the images)",
    )
    add("--seeds", type=int, metavar="N", help="runs of each arm, 1 to 100 (default: 3, quick 1)")
    add("--epochs", type=int, metavar="N", help="epochs of each run, 1 to 1000 (default: 8, quick 7)")
    add("--batch-size", type=int, default=64, metavar="N", help="2 to 65536 (default: %(default)s)")
    add("--lr", type=float, default=0.02, metavar="X", help="constant rate of plain, 0 to 10 (default: %(default)s)")
    add("--samples", type=int, metavar="N", help="training images, at least 10 (default: 2000, quick 1600; yours: all)")
    add(
        "--test-samples", type=int, metavar="N", help="test images, at least 10 (default: 1000, quick 500; yours: 2000)"
    )
    add("--width", type=int, metavar="N", help="channels of convnet's stem, 4 to 1024 (default: 24 grey, 32 colour)")
    add("--image-size", type=int, metavar="N", help="side for a folder's images, 8 to 512 (default: 64 or less)")
    add("--pretrain-epochs", type=int, metavar="N", help="before finetune and freeze, 1 to 1000 (default: epochs / 2)")
    add(
        "--target",
        type=float,
        metavar="X",
        help="accuracy to reach, 0 to 1 (default: the lowest that a plain run ends with)",
    )
    add("--accelerator", default="auto", metavar="NAME", help="auto, cpu, gpu, cuda or mps (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="torch's threads, 1 to 1024 (default: torch's choice)")
    add("--out", default="compare-results", metavar="DIR", help="folder for the results (default: %(default)s)")
    add("--no-progress", action="store_true", help="show no progress bars")
    return parser


def _compare(args: argparse.Namespace) -> int:
    missing = [name for module, name in BENCH.items() if util.find_spec(module) is None]
    if missing:
        return _fail(f"{', '.join(missing)} not installed: pip install 'lightning-speedups[bench]'")
    # Imported here, so that --help and a mistyped option answer at once
    from rich.console import Console

    from lightning_speedups.measure import ARMS, CompareError, Settings, compare

    if args.list_arms:
        sys.stdout.writelines(
            f"{arm.name:<10} {arm.description}{' (by name only)' * arm.on_request}\n" for arm in ARMS.values()
        )
        return 0
    names = [name.strip() for name in args.arms.split(",") if name.strip()] if args.arms is not None else None
    try:
        settings = Settings(
            model=args.model,
            weights=args.weights,
            seeds=args.seeds,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            samples=args.samples,
            test_samples=args.test_samples,
            width=args.width,
            image_size=args.image_size,
            target=args.target,
            pretrain_epochs=args.pretrain_epochs,
            accelerator=args.accelerator,
            threads=args.threads,
            quick=args.quick,
        )
        result = compare(args.data, names, settings=settings, out=args.out, progress=not args.no_progress)
    except CompareError as error:
        return _fail(str(error))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a table is not lost for a sign that the terminal lacks
    # a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 100).print(result.table())
    sys.stdout.write(f"Written: {args.out}/compare.png and {args.out}/compare.json\n")
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
        args = _parser().parse_args(argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    try:
        return _compare(args)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted before the first run: nothing measured\n")
        return INTERRUPTED
