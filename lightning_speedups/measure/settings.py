"""What can be asked of a comparison: a setting is one field, from which its check, its help and the command line's
option come.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lightning_speedups.core.arguments import check_choice, check_number, make_plain
from lightning_speedups.measure.errors import CompareError, as_compare_error

DEFAULT_MODEL = "convnet"
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


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

    def check(self, name: str, value: Any) -> None:
        """Refuse a number out of range and a word that is no choice.

        Args:
            name: The setting's name.
            value: What was given.

        Raises:
            ValueError: If the value breaks the rule.
        """
        if value is None and self.default is None:
            return
        if self.range:
            check_number(name, value, *self.range, above=self.kind is float, whole=self.kind is int)
        if self.choices:
            check_choice(name, value, self.choices)


def _option(default: Any, meaning: str, *rule: Any, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(default, meaning, *rule, **more)})


@dataclass(frozen=True)
class Settings:
    """Size and choices of a comparison; ``None`` leaves a value to the images and the model.

    Raises:
        CompareError: If a value is out of its range, or two do not go together.
    """

    model: str = _option(DEFAULT_MODEL, "a timm model, or the small network convnet", kind=str, metavar="NAME")
    weights: str | None = _option(
        None, "what finetune and freeze start from: a weight file, or 'pretrained' for timm's own",
        unset="a network trained on quarter turns of the images", kind=str, metavar="PATH",
    )  # fmt: skip
    seeds: int | None = _option(None, "runs of each arm", (1, 100), "3, quick 1")
    epochs: int | None = _option(None, "epochs of each run", (1, 1000), "8, quick 7")
    batch_size: int = _option(64, "samples in a training batch", (2, 65536))
    lr: float = _option(0.02, "constant rate of plain", (0, 10), kind=float)
    samples: int | None = _option(None, "training images", (10, 10**7), "2000, quick 1600; yours: all")
    test_samples: int | None = _option(None, "test images", (10, 10**7), "1000, quick 500; yours: 2000")
    width: int | None = _option(None, "channels of convnet's stem", (4, 1024), "24 grey, 32 colour")
    image_size: int | None = _option(None, "side of a folder's images, in pixels", (8, 512), "64 or less")
    target: float | None = _option(None, "accuracy to reach", (0, 1), "the lowest that a plain run ends with", float)
    pretrain_epochs: int | None = _option(None, "epochs before finetune and freeze", (1, 1000), "half of the epochs")
    accelerator: str = _option("auto", "what to train on", kind=str, metavar="NAME", choices=ACCELERATORS)
    threads: int | None = _option(None, "torch's threads", (1, 1024), "torch's choice")
    quick: bool = _option(False, "one seed, fewer samples and epochs: under a minute on two cores", kind=bool)

    def __post_init__(self) -> None:
        make_plain(self)
        with as_compare_error("", ValueError):
            for name, option in OPTIONS.items():
                option.check(name, getattr(self, name))
        if self.weights == "pretrained" and self.model == DEFAULT_MODEL:
            raise CompareError(f"`weights` pretrained needs a timm `model`; {DEFAULT_MODEL} takes the path of a file")
        if self.weights is not None and self.pretrain_epochs is not None:
            raise CompareError("`weights` and `pretrain_epochs` are two sources of one backbone: choose one of them")

    @property
    def run_seeds(self) -> range:
        """The seeds themselves."""
        return range(self.seeds or (1 if self.quick else 3))

    @property
    def run_epochs(self) -> int:
        """Epochs of each run."""
        return self.epochs or (7 if self.quick else 8)

    @property
    def run_pretrain_epochs(self) -> int:
        """Epochs of each pretraining."""
        return self.pretrain_epochs or max(1, self.run_epochs // 2)

    @property
    def collages(self) -> tuple[int, int]:
        """Training and test images to make when the caller brings none."""
        train, test = (1600, 500) if self.quick else (2000, 1000)
        return self.samples or train, self.test_samples or test


OPTIONS: dict[str, Option] = {one.name: one.metadata["option"] for one in fields(Settings)}
_lines = [f"        {name}: {option.help}." for name, option in OPTIONS.items()]
Settings.__doc__ = "\n".join([f"{Settings.__doc__}", "    Attributes:", *_lines])
