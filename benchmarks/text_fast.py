"""The recipe text-fast with other arguments, or without one of its parts, against plain training on the embedded text.

Paired by seed and interleaved, as `lightning-speedups compare --task text`. Run nothing beside it.

    for rate in 0.0005 0.001 0.002 0.004; do python benchmarks/text_fast.py --validation --seeds 1 --lr $rate; done  # plain's own
    python benchmarks/text_fast.py --validation --seeds 1 --variants "batch_size=8;lr=0.03 rest_lr=0.01;precision=32-true"
    python benchmarks/text_fast.py --ablation --out benchmarks/results

A variant is arguments of the recipe, and `length` (its share of plain's windows, 0.3), `precision` (of the Trainer), and
`without` (the name of a callback). `--validation` tests on other windows of the held-out modules than `compare` does: for
choosing, which those must not be. `--samples 9600` has a third of plain's steps. The results are in compare.json and .png.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
from dataclasses import replace
from functools import partial

from rich.console import Console

from lightning_speedups import trainer_defaults
from lightning_speedups.measure import Arm, Ingredients, compare
from lightning_speedups.measure.text import library_text
from lightning_speedups.measure.text_arms import TEXT_ARMS
from lightning_speedups.recipes import recipe

PARTS = ("MuonCallback", "LRCurve", "FastStart", "SequenceLengthWarmup")
TEST = 500


def parsed(text):
    """Return `{"batch_size": 8}` of `batch_size=8`."""
    options = dict(pair.split("=", 1) for pair in text.split())
    for name, given in options.items():
        with contextlib.suppress(ValueError, SyntaxError):
            options[name] = ast.literal_eval(given)
    return options


def built(options, at):
    options = {"precision": trainer_defaults("auto")["precision"], "without": None} | options
    trainer, without = {"precision": options.pop("precision")}, options.pop("without")
    stack = recipe("text-fast", (at.data.x_train, at.data.y_train), epochs=at.epochs, seed=at.seed, **options)
    callbacks = [one for one in stack.trainer["callbacks"] if type(one).__name__ != without]
    return Ingredients(callbacks, trainer, stack.loss, loader=stack.loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="", help="separated by semicolons; none: plain alone")
    parser.add_argument("--ablation", action="store_true", help="the recipe, and without each of its callbacks")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=28_800)
    parser.add_argument("--lr", type=float, default=None, help="plain's rate")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    variants = [text.strip() for text in args.variants.split(";") if text.strip()]
    if args.ablation:
        variants = ["length=0.3", *(f"without={name}" for name in PARTS), "precision=32-true"]
    data = library_text(args.samples, 2 * TEST)
    part = slice(TEST, None) if args.validation else slice(TEST)
    data = replace(data, x_test=data.x_test[part], y_test=data.y_test[part])
    for text in variants:
        options = parsed(text)
        length = options.pop("length", 0.3)
        TEXT_ARMS[text] = Arm(text, f"text-fast, {text}", partial(built, options), length=length)
    asked = {"task": "text", "samples": args.samples, "seeds": args.seeds, "lr": args.lr, "out": args.out}
    Console(width=110).print(compare(data, ["plain", *variants], **asked, test_samples=TEST).table())


if __name__ == "__main__":
    main()
