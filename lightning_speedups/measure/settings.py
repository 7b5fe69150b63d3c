"""What was asked of a comparison, checked and filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_speedups.core.arguments import check_choice, check_number, make_plain
from lightning_speedups.measure.errors import CompareError, as_compare_error
from lightning_speedups_command import DEFAULT_MODEL, OPTIONS, Asked


def _check(name: str, value: Any) -> None:
    """Refuse a number out of range and a word that is no choice."""
    option = OPTIONS[name]
    if value is None and option.default is None:
        return
    if option.range:
        check_number(name, value, *option.range, above=option.kind is float, whole=option.kind is int)
    if option.choices:
        check_choice(name, value, option.choices)


@dataclass(frozen=True)
class Settings(Asked):
    """Size and choices of a comparison; ``None`` leaves a value to the images and the model.

    Raises:
        CompareError: If a value is out of its range, or two do not go together.
    """

    def __post_init__(self) -> None:
        make_plain(self)
        with as_compare_error("", ValueError):
            for name in OPTIONS:
                _check(name, getattr(self, name))
        if self.weights == "pretrained" and self.model == DEFAULT_MODEL:
            raise CompareError(f"`weights` pretrained needs a timm `model`; {DEFAULT_MODEL} takes the path of a file")
        if self.weights is not None and self.pretrain_epochs is not None:
            raise CompareError("`weights` and `pretrain_epochs` are two sources of one backbone: choose one of them")

    @property
    def run_seeds(self) -> range:
        """The seeds themselves."""
        return range(self.seeds or (1 if self.quick else 2))

    @property
    def run_epochs(self) -> int:
        """Epochs of each run."""
        return self.epochs or (6 if self.quick else 8)

    @property
    def run_pretrain_epochs(self) -> int:
        """Epochs of each pretraining."""
        return self.pretrain_epochs or max(1, self.run_epochs // 2)

    @property
    def collages(self) -> tuple[int, int]:
        """Training and test images to make when the caller brings none."""
        train, test = (3000, 1000) if self.quick else (8000, 2000)
        return self.samples or train, self.test_samples or test


_lines = [f"        {name}: {option.help}." for name, option in OPTIONS.items()]
Settings.__doc__ = "\n".join([f"{Settings.__doc__}", "    Attributes:", *_lines])
