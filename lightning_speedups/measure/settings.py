"""What was asked of a comparison, checked and filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_speedups.core.arguments import check_choice, check_number, make_plain
from lightning_speedups.measure.errors import CompareError, as_compare_error
from lightning_speedups_command import DEFAULT_MODEL, OPTIONS, Asked

MOST_LOSS = 100
"""The highest loss that can be asked for."""
IMAGES_ONLY = ("model", "weights", "image_size", "pretrain_epochs")
"""What says nothing of a text."""
DEFAULTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "images": {
        "epochs": (8, 6),
        "batch_size": (64, 64),
        "lr": (0.02, 0.02),
        "samples": (8000, 3000),
        "test_samples": (2000, 1000),
    },
    "text": {
        "epochs": (1, 1),
        "batch_size": (32, 32),
        "lr": (0.001, 0.001),
        "samples": (28800, 3200),
        "test_samples": (500, 200),
    },
    "lines": {
        "epochs": (4, 2),
        "batch_size": (64, 64),
        "lr": (0.002, 0.002),
        "samples": (20000, 4000),
        "test_samples": (2000, 500),
    },
}
"""What is taken by a task where nothing is asked for: in full, and in a quick comparison."""


def _check(name: str, value: Any, task: str) -> None:
    """Refuse a number out of range and a word that is no choice."""
    option = OPTIONS[name]
    if value is None and option.default is None:
        return
    if option.range:
        low, high = option.range
        most = MOST_LOSS if (name, task) == ("target", "text") else high
        check_number(name, value, low, most, above=option.kind is float, whole=option.kind is int)
    if option.choices:
        check_choice(name, value, option.choices)


@dataclass(frozen=True)
class Settings(Asked):
    """Size and choices of a comparison; ``None`` leaves a value to the task, its data and the model.

    Raises:
        CompareError: If a value is out of its range, or two do not go together.
    """

    def __post_init__(self) -> None:
        make_plain(self)
        with as_compare_error("", ValueError):
            for name in OPTIONS:
                _check(name, getattr(self, name), self.task)
        told = [name for name in IMAGES_ONLY if getattr(self, name) != OPTIONS[name].default]
        if self.task != "images" and told:
            raise CompareError(f"`{told[0]}` is for images, not for {self.task}")
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
        return int(self._given("epochs"))

    @property
    def run_pretrain_epochs(self) -> int:
        """Epochs of each pretraining."""
        return self.pretrain_epochs or max(1, self.run_epochs // 2)

    @property
    def run_batch_size(self) -> int:
        """Samples in a training batch."""
        return int(self._given("batch_size"))

    @property
    def run_lr(self) -> float:
        """Constant rate of plain."""
        return float(self._given("lr"))

    @property
    def embedded(self) -> tuple[int, int]:
        """Training and test samples to make when the caller brings none."""
        return int(self._given("samples")), int(self._given("test_samples"))

    def _given(self, name: str) -> Any:
        asked = getattr(self, name)
        return DEFAULTS[self.task][name][self.quick] if asked is None else asked


_lines = [f"        {name}: {option.help}." for name, option in OPTIONS.items()]
Settings.__doc__ = "\n".join([f"{Settings.__doc__}", "    Attributes:", *_lines])
